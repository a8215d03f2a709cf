import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlfast.deploy import Predictor, export_model
from mlfast.deploy import export as module
from mlfast.deploy.export import DeployedModel, exported_program
from mlfast.deploy.model_info import ModelInfo
from mlfast.deploy.runtimes import open_model
from mlfast.models import create_model


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.linspace(-1, 1, 192))

    def weight(self):
        return torch.sigmoid(self.inner)


@pytest.mark.parametrize(
    ("backbone", "head", "head_args", "graph"),
    [
        ("test_efficientnet", "gap", {}, True),
        ("test_resnet", "csra", {}, False),
        ("test_resnet", "q2l", {"embed_dim": 32, "feedforward_dim": 32}, False),
        ("test_vit", "ml_decoder", {"embed_dim": 32, "feedforward_dim": 32}, False),
    ],
)
def test_graphs_hold_pytorch_operators_only(backbone, head, head_args, graph):
    torch.manual_seed(0)
    branch = None
    if graph:
        channels = create_model(backbone, 2).classifier.weight.shape[1]
        branch = Branch()
        branch.inner = nn.Parameter(torch.linspace(-1, 1, channels))
    model = create_model(backbone, 5, head=head, head_args=head_args, image_size=32, graph=branch)
    model(torch.randn(8, 3, 32, 32))
    program = exported_program(DeployedModel(model.fold()).eval(), 32)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    operators = {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)}
    assert operators == {"aten"}, called
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        truth = model.probabilities(model.eval()(images))
        logits, probabilities = program.module()(images)
    torch.testing.assert_close(probabilities, truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.sigmoid(logits), truth, rtol=0, atol=1e-5)


def assert_same_decisions(ours, theirs, in_torch):
    """Labels of both, but those whose probability is within rounding of the threshold."""
    clear = np.abs(theirs.probabilities - in_torch.thresholds) > 1e-5
    assert clear.mean() > 0.8
    names = {in_torch.classes[k] for k in np.flatnonzero(clear)}
    assert set(ours.labels) & names == set(theirs.labels) & names


def test_onnx(exported, tuned_folder, model_folder, arrays):
    export = exported("onnx")
    assert export.path == tuned_folder[0] / "model.onnx"
    assert 0 < export.difference < 1e-5 and export.images == 16
    predictor, in_torch = Predictor(export.path, batch_size=10), Predictor(tuned_folder[0])
    assert predictor.info == in_torch.info
    for ours, theirs in zip(predictor(arrays), in_torch(arrays), strict=True):
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)
        assert_same_decisions(ours, theirs, in_torch)


def test_onnx_is_one_file_without_own_operators(exported, tuned_folder):
    import onnx

    path = exported("onnx").path
    proto = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(proto)
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert {domain.domain for domain in proto.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    batch, *rest = proto.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [side.dim_value for side in rest] == [3, 32, 32]
    assert [output.name for output in proto.graph.output] == ["logits", "probabilities"]
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    own = json.loads(facts["mlfast"])
    assert own["thresholds"] == tuned_folder[1].tolist() and own["classes"][0] == "red 0"
    assert own["chosen_on"] == "the test"
    assert ModelInfo.from_json(json.dumps({k: v for k, v in own.items() if k != "chosen_on"}), "").chosen_on == ""
    assert (own["image_size"], own["mean"], own["std"]) == (32, [0.5] * 3, [0.5] * 3)
    assert facts["model_info labels"].startswith("red_0 red_1 ")


def test_the_snippet_of_the_page_gives_the_labels_of_the_predictor(exported, arrays, tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text()
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in code)
    path = exported("onnx").path
    monkeypatch.chdir(tmp_path)
    shutil.copy(path, "model.onnx")
    Image.fromarray(arrays[0]).resize((80, 50)).save("photo.jpg", quality=95)
    found = {}
    exec(snippet, found)
    expected = Predictor(path)("photo.jpg").labels
    assert expected and found["labels"] == pytest.approx(expected, abs=1e-5)


def test_openvino_with_folded_thresholds(exported, tuned_folder, arrays):
    """One threshold of 0.5 decides as the tuned ones did."""
    export = exported("openvino")
    assert {path.name for path in tuned_folder[0].iterdir()} >= {"model.xml", "model.bin"}
    assert 0 < export.difference < 1e-5
    folded, in_torch = Predictor(export.path), Predictor(tuned_folder[0])
    assert set(folded.thresholds) == {0.5} and folded.info.chosen_on == "the test"
    shift = np.log(tuned_folder[1] / (1 - tuned_folder[1]))
    for ours, theirs in zip(folded(arrays), in_torch(arrays), strict=True):
        assert_same_decisions(ours, theirs, in_torch)
        expected = 1 / (1 + np.exp(shift) * (1 / theirs.probabilities - 1))
        told = theirs.probabilities < 0.99  # nearer to 1, float32 has lost the digits that this formula needs
        np.testing.assert_allclose(ours.probabilities[told], expected[told], atol=1e-5)


def test_openvino_says_what_model_api_reads(exported):
    import openvino

    model = openvino.Core().read_model(exported("openvino").path)

    def read(key):
        return model.get_rt_info(["model_info", key]).astype(str)

    assert read("model_type") == "Classification" and read("multilabel") == "True"
    assert read("confidence_threshold") == "0.5" and read("labels").split(" ")[1] == "red_1"
    assert read("mean_values") == read("scale_values") == "127.5 127.5 127.5"
    assert [output.get_any_name() for output in model.outputs] == ["logits", "probabilities"]  # a sigmoid of the first
    assert model.inputs[0].partial_shape.to_string() == "[?,3,32,32]"


def test_torch_program(tuned_folder, tmp_path, arrays):
    export = export_model(tuned_folder[0], "torch", tmp_path / "new" / "program.pt2")
    assert export.difference < 1e-5
    extra = {"mlfast.json": ""}
    program = torch.export.load(export.path, extra_files=extra).module()
    assert json.loads(extra["mlfast.json"])["thresholds"] == tuned_folder[1].tolist()
    images = (torch.from_numpy(np.stack(arrays[:5])).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = np.stack([result.probabilities for result in Predictor(tuned_folder[0])(arrays[:5])])
    np.testing.assert_allclose(program(images)[1].detach(), expected, atol=1e-5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["program.pt2"]


def test_a_runtime_that_differs_is_refused_and_leaves_nothing(tuned_folder, tmp_path, monkeypatch):
    def broken(program, info, path):
        path.write_bytes(b"written")
        return lambda images: np.full((len(images), 40), 0.5, np.float32)

    monkeypatch.setitem(module._WRITERS, "torch", broken)
    (tmp_path / "model.pt2").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"differ from PyTorch's by up to \d\.\de-01, more than 1e-04"):
        export_model(tuned_folder[0], "torch", tmp_path / "model.pt2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pt2", b"old")]


def test_nan_is_refused(tuned_folder, tmp_path, monkeypatch):
    def broken(program, info, path):
        return lambda images: np.full((len(images), 40), np.nan, np.float32)

    monkeypatch.setitem(module._WRITERS, "torch", broken)
    with pytest.raises(ValueError, match="by up to nan"):
        export_model(tuned_folder[0], "torch", tmp_path / "model.pt2")


def test_thresholds_at_the_ends_fold_to_finite_logits():
    model = create_model("test_resnet", 3).eval()
    deployed = DeployedModel(model, torch.tensor([0.0, 0.5, 1.0])).eval()
    with torch.no_grad():
        logits, probabilities = deployed(torch.randn(2, 3, 32, 32))
    assert logits.isfinite().all() and logits.dtype == torch.float32
    assert (probabilities[:, 0] > 0.5).all() and (probabilities[:, 2] < 0.5).all()


def test_any_name_of_the_file(model_folder, tmp_path):
    path = tmp_path / "a[1]*.pt2"
    assert export_model(model_folder[0], "torch", path).path == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_wrong_use(model_folder, tmp_path):
    folder = model_folder[0]
    with pytest.raises(ValueError, match="file_format: got 'tflite', expected one of 'onnx', 'openvino', 'torch'"):
        export_model(folder, "tflite")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.pt2"):
        export_model(folder, "torch", tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="no thresholds to fold; choose them with: mlfast evaluate"):
        export_model(folder, "torch", fold_thresholds=True)


def test_a_place_that_cannot_be_written_is_named(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "exported_program", lambda *_: None)  # seconds that nothing here needs
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/x\.pt2 cannot be written \(.*\); choose another output \(--output FILE\)"):
        export_model(model_folder[0], "torch", tmp_path / "file" / "x.pt2")


def test_a_missing_package_is_named(model_folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r'needs openvino: pip install "\.\[openvino\]" in a checkout of mlfast|needs onnx'
    ):
        export_model(model_folder[0], "openvino")


def test_a_file_of_another_program_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    tensor = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["images"], ["other"])
    graph = onnx.helper.make_graph([node], "g", [tensor], [other])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "other.onnx"
    onnx.save(proto, path)
    with pytest.raises(ValueError, match="not written by mlfast export"):
        open_model(path)
    for text, message in (("{", "Expecting"), ('{"format": 7}', "format 1"), ('{"format": 1}', "incomplete")):
        onnx.helper.set_model_props(proto, {"mlfast": text})
        onnx.save(proto, path)
        with pytest.raises(ValueError, match=f"other.onnx: .*{message}"):
            open_model(path)
