"""The counts against formulas, and against the figures of the paper and of other counters."""

import pytest
import torch

import mlfast
from mlfast import cli
from mlfast.models.macs import PAPER_ROWS, PaperRow, count, paper_line
from mlfast.training.recipes import read_recipe, recipe_names

V2S, TRESNET = "tf_efficientnetv2_s.in21k", "tresnet_v2_l"
# What upstream's two tools give for the plain networks: the paper took its plain rows from the one, those with an
# ML-Decoder from the other. TResNets are counted alike by all.
PTFLOPS = {(V2S, 448): 10.828, (V2S, 576): 17.896}
FVCORE = {(V2S, 448): 11.48, (V2S, 576): 18.98, ("tf_efficientnetv2_l.in21k", 448): 49.13}
OURS = {(V2S, 448): 11.38, (V2S, 576): 18.81, ("tf_efficientnetv2_l.in21k", 448): 48.85}


def giga(row):
    return count(row.backbone, row.head, row.num_classes, row.image_size, row.graph).macs / 1e9


def ml_decoder_macs(tokens, channels, num_classes, groups):
    per_token = channels * 768 + 2 * 768**2
    per_query = 2 * 768**2 + 2 * 768 * 2048 + 2 * tokens * 768
    return tokens * per_token + groups * per_query + groups * -(-num_classes // groups) * 768


@pytest.mark.parametrize("row", [row for row in PAPER_ROWS if row.printed], ids=str)
def test_every_figure_of_the_paper_is_ours_but_for_what_its_tools_count(row):
    network = row.backbone, row.image_size
    if "efficientnet" not in row.backbone:
        assert giga(row) == pytest.approx(row.printed, rel=0.003)
        return
    tool = FVCORE if row.head == "ml_decoder" else PTFLOPS
    assert giga(row) - OURS[network] == pytest.approx(row.printed - tool[network], abs=0.05)


def test_graph_branches_cost_parameters_and_nothing_at_inference():
    plain, gat, gcn = (count(V2S, "gap", 80, 448, graph) for graph in (None, "gat_reweight", "gcn_reweight"))
    assert plain.macs == gat.macs == gcn.macs
    assert gcn.parameters - plain.parameters == 300 * 1280 + 1280**2
    assert gat.parameters - gcn.parameters == 4 * 1280  # two attention vectors a layer
    assert count(V2S, "gap", 80, 448, "gcn_reweight", graph_args={"hidden_features": 8}).parameters < gcn.parameters


def test_efficientnet_and_what_ml_decoder_adds():
    plain, decoder = (count(V2S, head, 80, 448) for head in ("gap", "ml_decoder"))
    added = decoder.macs - plain.macs + 80 * 1280  # the plain head's own
    assert added == ml_decoder_macs(14 * 14, 1280, 80, 80)
    assert added / 1e9 == pytest.approx(0.79, abs=0.005)  # not the paper's 12.28 - 10.83 = 1.45
    # 26.80 M parameters in the released model: with frozen queries, and a bias beside the cosine.
    assert (decoder.parameters + 80 * 768 + 80) / 1e6 == pytest.approx(26.80, abs=0.005)


def test_parameters_of_the_released_tresnet():
    cost = count(TRESNET, "ml_decoder", 80, 448)
    assert (cost.parameters + 80 * 768 + 80) / 1e6 == pytest.approx(51.34, abs=0.005)


def test_other_heads_by_their_formulas():
    heads = ("gap", "q2l", "csra", "ml_gcn", "gatn")
    gap, q2l, csra, ml_gcn, gatn = (count("test_efficientnet", head, 10, 64).macs for head in heads)
    n, d, k = 4, 256, 10
    assert csra - gap == (n - 1) * k * d
    encoder = n * (4 * d**2 + 8 * d**2) + 2 * n**2 * d
    decoder = k * 4 * d**2 + 2 * k**2 * d + k * 2 * d**2 + n * 2 * d**2 + 2 * k * n * d + k * 8 * d**2
    assert q2l - gap == encoder + 2 * decoder
    assert gap == ml_gcn == gatn  # one product with each classifier, wherever that comes from


@pytest.mark.parametrize(("head", "graph"), [("gap", "gcn_reweight"), ("csra", None), ("gatn", None), ("ml_gcn", None)])
def test_parameters_are_those_of_the_model(head, graph):
    model = mlfast.create_model(
        "test_resnet",
        10,
        head=head,
        graph=graph,
        label_vectors=torch.ones(10, 300),
        cooccurrence=torch.full((10, 10), 3),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count("test_resnet", head, 10, 64, graph).parameters == trained


def test_rows_are_those_of_the_tables():
    assert len(set(PAPER_ROWS)) == len(PAPER_ROWS)
    assert {row.data for row in PAPER_ROWS} == {"COCO", "VOC", "NUS", "VG500"}
    models = {(row.backbone, row.head, row.graph, row.image_size, row.num_classes): row for row in PAPER_ROWS}
    classes = {"coco": 80, "voc2007": 20, "nus_wide": 81, "vg500": 500}
    for name in recipe_names():  # of these tables: each is a row, with the same figure
        recipe = read_recipe(name)
        if recipe.title.startswith(("Table 2", "Table 3", "Table 4", "Table 5")):
            of = recipe.settings
            key = of["backbone"], of["head"], of.get("graph"), of["image_size"], classes[of["data"]]
            printed = models[key].printed
            assert recipe.gmacs == ("not stated" if printed is None else f"{printed:.2f}"), name


def test_info(capsys):
    assert cli.main(["info", "--backbone", "test_resnet", "--head", "csra", "--num-classes", "10"]) == 0
    cost = count("test_resnet", "csra", 10, 448)
    assert capsys.readouterr().out.splitlines() == [
        "test_resnet, csra, 10 labels, 448 pixels",
        f"{cost.parameters / 1e6:.2f} M parameters, {cost.macs / 1e9:.2f} GMACs by torch.utils.flop_counter",
    ]


def test_info_of_a_recipe(capsys):
    assert cli.main(["info", "coco-effnetv2s-gat"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{V2S}, gap behind gat_reweight, 80 labels, 448 pixels"
    assert "11.38 GMACs by torch.utils.flop_counter; the paper prints 10.83 (docs/models.md" in second
    assert cli.main(["info", "nus-effnetv2s-gat"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "81 labels" in first and second.endswith("; the paper's figure is not in our sources")
    assert cli.main(["info", "vg500-effnetv2s-mld", "--backbone", "test_resnet"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "test_resnet, ml_decoder, 500 labels, 576 pixels" and "for the recipe as it is" in second


def test_info_of_the_paper_prints_every_row(capsys, monkeypatch):
    rows = (
        PaperRow("VOC", "test_resnet", "gap", 20, 64, 1.5, "gat_reweight"),
        PaperRow("NUS", "test_vit", "ml_decoder", 20, 160),
    )
    monkeypatch.setattr("mlfast.models.macs.PAPER_ROWS", rows)
    assert cli.main(["info", "--paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == paper_line() and len(lines) == 4
    assert lines[1].split()[:6] == ["VOC", "test_resnet", "gap", "gat_reweight", "20", "64"]
    assert lines[1].endswith("1.50") and lines[2].endswith(" -")
    assert len({len(line) for line in lines[:3]}) == 1


def test_info_names_what_is_wrong(capsys):
    assert cli.main(["info", "--backbone", "resnet51"]) == 2
    assert "mlfast info: unknown backbone 'resnet51'; did you mean" in capsys.readouterr().err
    assert cli.main(["info", "coco-effnet"]) == 2
    assert "did you mean coco-effnetv2s-mld" in capsys.readouterr().err
    assert cli.main(["info", "mine.yaml"]) == 2
    assert "'mine.yaml' is no recipe; mlfast recipes lists them" in capsys.readouterr().err
