"""The files come from anywhere: nothing in them may lead out of the folder, fill the memory or be misread."""

import pytest

from mlfast.data import AnnotationError
from mlfast.data.sources import Sources, safe_path, shown

BOMB = """<?xml version="1.0"?>
<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""
OTHER_FILE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>'


@pytest.mark.parametrize(
    "path", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "a\\..\\..\\x", "", "a\0b", None, 3]
)
def test_paths_that_lead_out_are_refused(path):
    with pytest.raises(AnnotationError, match=r"list.txt, line 7: the image path .* is refused"):
        safe_path(path, "list.txt, line 7")


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("a\\b c.jpg", "a/b c.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("..a/b...jpg", "..a/b...jpg"),
        ("日本/é.jpg", "日本/é.jpg"),
        (" a.jpg", " a.jpg"),
    ],
)
def test_paths_are_made_uniform(path, clean):
    assert safe_path(path, "") == clean


@pytest.mark.parametrize("text", [BOMB, OTHER_FILE])
def test_xml_entities_are_refused(write, text):
    with pytest.raises(AnnotationError, match=r"a\.xml, line \d: a DTD or entity declaration is refused"):
        Sources(write({"a.xml": text})).xml_elements("a.xml")


def test_broken_xml_has_its_line(write):
    with pytest.raises(AnnotationError, match=r"a\.xml, line 2: not well-formed"):
        Sources(write({"a.xml": "<a>\n<b></a>"})).xml_elements("a.xml")


def test_lines_with_any_ends_and_a_byte_order_mark(write):
    sources = Sources(write({"a.txt": b"\xef\xbb\xbfone\r\ntwo words \n\n  \nth\xc3\xa9\xe2\x80\xa8ree"}))
    assert [line for _, line in sources.lines("a.txt")] == ["one", "two words", "thé\u2028ree"]
    assert [where.rpartition("line ")[2] for where, _ in sources.lines("a.txt")] == ["1", "2", "5"]


def test_wrong_encoding_names_the_line(write):
    with pytest.raises(AnnotationError, match=r"a\.txt, line 2: not UTF-8 .* save the file as UTF-8"):
        list(Sources(write({"a.txt": b"one\ncaf\xe9\n"})).lines("a.txt"))


def test_broken_json_shows_the_line(write):
    with pytest.raises(AnnotationError, match=r"a\.json, line 2: not JSON .*oops"):
        Sources(write({"a.json": '{"a": 1,\n oops}'})).json("a.json")
    with pytest.raises(AnnotationError, match="nested too deeply"):
        Sources(write({"a.json": "[" * 200_000})).json("a.json")


def test_missing_files_say_what_is_there(write):
    sources = Sources(write({"lists/train.txt": "", "lists/val.txt": ""}))
    with pytest.raises(AnnotationError, match=r"test.txt does not exist. .*lists holds: train.txt, val.txt"):
        sources.text("lists/test.txt")
    with pytest.raises(AnnotationError, match=r"The folder .*nowhere does not exist either"):
        sources.text("nowhere/a")
    with pytest.raises(AnnotationError, match="is not a folder"):
        Sources(sources.root / "absent")


def test_quotes_are_short():
    assert len(shown("x" * 1_000_000)) < 200 and "\n" not in shown("a\nb")
