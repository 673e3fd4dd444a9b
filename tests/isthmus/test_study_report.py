import dataclasses
import json
import re
from hashlib import sha256
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from isthmus import figures
from isthmus.base.errors import DataError, OutputError
from isthmus.merge import connect, evaluate, merge
from isthmus.merge.layerwise import feature_connectivity, layerwise_paths
from isthmus.plain import dumps, number
from isthmus.report import write_report
from isthmus.study import Study, study
from isthmus.zoo import load_data, loader, mlp


@pytest.fixture(scope="module")
def pair_and_data(pair):
    from isthmus.base.files import load_state_dict

    models = []
    for name in "ab":
        model = mlp(64, [24, 16], seed=0)
        model.load_state_dict(load_state_dict(pair / f"{name}.safetensors"))
        models.append(model)
    return models, loader(load_data("digits", "test")), loader(load_data("digits", "train"))


@pytest.fixture(scope="module")
def plain(pair_and_data) -> Study:
    models, test_set, _ = pair_and_data
    return study(models[0], models[1], test_set, points=5, eval_name="digits, <test> split")


@pytest.fixture(scope="module")
def repaired(pair_and_data) -> Study:
    models, test_set, train_set = pair_and_data
    return study(
        models[0],
        models[1],
        test_set,
        data_match=train_set,
        method="activations",
        repair="auto",
        weights=[0.75, 0.25],
        points=5,
        eval_name="digits, test split",
        match_name="digits, train split",
    )


def test_study_is_the_composition_of_its_parts(pair_and_data, plain):
    (a, b), test_set, _ = pair_and_data
    assert plain.naive.loss.tolist() == connect(a, b, test_set, points=5).loss.tolist()
    matched = connect(a, plain.matching.apply(b), test_set, points=5)
    assert plain.matched.loss.tolist() == matched.loss.tolist()
    assert plain.repaired is None
    for name, model in {"A": a, "B": b, "naive average": merge([a, b], align=None).model}.items():
        assert plain.networks[name]["loss"] == pytest.approx(evaluate(model, test_set).loss)
    assert plain.networks["merged"]["loss"] == pytest.approx(plain.matched.midpoint_loss, rel=1e-5)
    assert list(plain.networks) == ["A", "B", "naive average", "ensemble", "merged"]
    both = merge([a, b], test_set, align=None).report["ensemble"]
    assert plain.networks["ensemble"]["loss"] == pytest.approx(both["loss"], rel=1e-5)
    assert plain.networks["merged"]["loss"] < plain.networks["naive average"]["loss"]
    assert plain.verdict.startswith("After matching, the loss barrier falls from ")


def test_study_goes_layer_by_layer(pair_and_data, plain):
    (a, b), test_set, _ = pair_and_data
    ordered = plain.matching.apply(b)
    for name, model in {"as trained": b, "matched": ordered}.items():
        features = feature_connectivity(a, model, test_set)
        assert plain.features[name].cosine_distance.tolist() == features.cosine_distance.tolist()
        found = layerwise_paths(a, model, test_set, points=5)
        assert plain.layerwise[name].barriers.tolist() == found.barriers.tolist()
    assert plain.features["matched"].cosine_distance[-1] < plain.features["as trained"].cosine_distance[-1]
    without = study(a, b, test_set, points=3, layers=["fc1"], layer_points=0)
    assert without.layerwise == {}
    assert without.features["matched"].layers == ("fc1",)
    assert list(figures.study_figures(without)) == ["loss", "accuracy", "scores", "similarity", "features"]


def test_paths_are_measured_on_both_sets_of_data(pair_and_data, plain, repaired):
    (a, b), test_set, train_set = pair_and_data
    also = repaired.naive.also["digits, train split"]
    assert also.loss == pytest.approx(connect(a, b, train_set, points=5).loss, rel=1e-6)
    assert plain.naive.also == {}
    assert repaired.intervals["as trained"] == connect(a, b, test_set, points=5).barrier_interval()
    low, high = repaired.intervals["matched"] or (1.0, 0.0)
    assert 0 <= low <= high
    unlabelled = [batch[0] for batch in train_set]
    assert study(a, b, test_set, data_match=unlabelled, points=3, layer_points=0).naive.also == {}
    one = [(torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64))]
    alone = dataclasses.replace(plain, naive=connect(a, b, one, points=3))
    assert alone.intervals["as trained"] is None


def test_options_of_the_mean_reach_both_averages(pair_and_data):
    (a, b), test_set, _ = pair_and_data
    found = study(a, b, test_set, points=3, layer_points=0, options={"by_layer": {"fc3": [1, 0]}})
    assert torch.equal(found.merged.get_parameter("fc3.bias"), a.get_parameter("fc3.bias"))


def test_repair_and_weights_reach_the_merged_network(pair_and_data, repaired):
    (a, b), test_set, train_set = pair_and_data
    ordered = repaired.matching.apply(b)
    expected = merge([a, ordered], test_set, align=None, weights=[3, 1], repair="rescale", repair_data=train_set)
    assert torch.equal(repaired.merged.get_parameter("fc1.weight"), expected.model.get_parameter("fc1.weight"))
    assert list(repaired.paths) == ["as trained", "matched", "matched and repaired"]
    assert repaired.settings["repair"] == "rescale"
    assert repaired.settings["match_data"] == "digits, train split"
    assert repaired.verdict.endswith(" after repair")


def test_study_refuses_what_it_cannot_read_twice(pair_and_data):
    models, test_set, _ = pair_and_data
    with pytest.raises(DataError, match="several times"):
        study(models[0], models[1], iter(test_set))
    with pytest.raises(DataError, match="no labels"):
        study(models[0], models[1], [torch.zeros(4, 64)])


def test_verdict_says_when_matching_did_not_help(plain):
    worse = dataclasses.replace(plain, matched=plain.naive)
    assert worse.verdict.startswith("Matching does not lower the loss barrier: ")
    with pytest.warns(UserWarning, match="NaN or infinite"):
        broken = dataclasses.replace(plain.naive, loss=np.full(5, np.nan))
    lost = dataclasses.replace(plain, naive=broken)
    assert "not finite" in lost.verdict
    assert json.loads(dumps(lost.to_dict()))["paths"]["as trained"]["barrier"] is None


class Page(HTMLParser):
    """Reads a page strictly: every element that opens must close."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_one_whole_page_that_fetches_nothing(tmp_path, pair, plain):
    file = pair / "a.safetensors"
    path = write_report(plain, tmp_path / "new" / "folder", files={"network A": file})
    text = path.read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.seen]
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    assert not re.search(r"https?://|@import|src=", text)
    targets = [value for _, attrs in page.seen for name, value in attrs.items() if "href" in name]
    ids = [attrs["id"] for _, attrs in page.seen if "id" in attrs]
    inline = "data:image/png;base64,"
    assert all(target and (target.startswith(inline) or target.removeprefix("#") in ids) for target in targets)
    assert len(ids) == len(set(ids))
    svgs = [attrs for tag, attrs in page.seen if tag == "svg"]
    assert len(svgs) == 6
    assert all(len(attrs["aria-label"] or "") > 20 for attrs in svgs)
    words = " ".join(page.text)
    assert plain.verdict in words
    assert "digits, <test> split" in words
    assert sha256(file.read_bytes()).hexdigest() in words
    assert "have seen" not in words
    assert "ensemble of A and B" in words
    low, high = plain.intervals["as trained"] or (0, 0)
    assert f"{number(low)} to {number(high)}" in words
    assert "Dotted: on" not in words
    assert "cosine similarity of weights" in words  # the axis label: text stays text


def test_report_json_holds_the_data_of_every_figure_and_table(tmp_path, pair, plain):
    write_report(plain, tmp_path, files={"network A": pair / "a.safetensors"})
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["paths"]["matched"]["loss"] == plain.matched.loss.tolist()
    assert content["paths"]["as trained"]["barrier"] == plain.naive.barrier
    assert content["matching"]["scores"]["fc1"] == plain.matching.scores["fc1"].tolist()
    assert content["similarity"]["values"] == plain.similarity.values.tolist()
    assert content["intervals"]["matched"] == list(plain.intervals["matched"] or ())
    assert content["features"]["matched"]["layers"][0]["layer"] == "fc1"
    assert content["layerwise"]["as trained"] == plain.layerwise["as trained"].to_dict()
    assert content["networks"]["merged"] == plain.networks["merged"]
    assert content["settings"]["samples"] == 359
    assert content["settings"]["device"] == "cpu"
    assert content["files"][0]["bytes"] == (pair / "a.safetensors").stat().st_size
    assert content["versions"]["torch"] == torch.__version__


def test_report_is_the_same_byte_for_byte(tmp_path, plain):
    first, second = (write_report(plain, tmp_path / name).read_bytes() for name in "ab")
    assert first == second
    assert b"given in memory" in first


def test_report_says_that_repaired_networks_have_seen_data(tmp_path, repaired):
    words = " ".join(Page(write_report(repaired, tmp_path).read_text()).text)
    assert "Repaired networks have seen digits, train split" in words
    assert "Dotted: on digits, train split." in words
    assert "matched, on digits, train split" in words
    assert "merged, repaired (rescale)" in words
    assert "their activations on digits, train split" in words
    assert "0.75, 0.25" in words
    # matched by weights, the data was read for the repair only
    by_weights = dataclasses.replace(repaired, settings={**repaired.settings, "method": "weights"})
    by_weights = dataclasses.replace(by_weights, matching=dataclasses.replace(repaired.matching, method="weights"))
    words = " ".join(Page(write_report(by_weights, tmp_path).read_text()).text)
    assert "into the order of A's by their weights." in words


def test_report_names_groups_without_scores_and_those_matched_by_weights(tmp_path, repaired):
    scores = dict(repaired.matching.scores)
    scores["fc1"] = torch.cat([scores["fc1"], torch.tensor([float("nan")], dtype=scores["fc1"].dtype)])
    matching = dataclasses.replace(repaired.matching, scores=scores, by_weights=("fc2",))
    changed = dataclasses.replace(repaired, matching=matching)
    words = " ".join(Page(write_report(changed, tmp_path).read_text()).text)
    assert "fc1 (1 without a score)" in words
    assert "fc2 (by weights)" in words
    assert json.loads((tmp_path / "report.json").read_text())["matching"]["scores"]["fc1"][-1] is None


def test_curves_of_many_groups_are_named_at_a_few_depths():
    generator = torch.Generator().manual_seed(0)
    scores = {f"layer{i}": torch.rand(5 + i, generator=generator) for i in range(30)}
    (ax,) = figures.scores_figure(scores, "score").axes
    assert len(ax.lines) == 30
    assert np.all(np.diff(np.asarray(ax.lines[7].get_ydata())) <= 0)
    legend = ax.get_legend()
    assert legend is not None
    named = [text.get_text() for text in legend.get_texts()]
    assert named[0] == "layer0 (5)"
    assert named[-1] == "layer29 (34)"
    assert len(named) == 5


def test_map_of_many_layers_names_some():
    from isthmus.metrics import compare

    model = nn.Sequential(*(nn.ReLU() for _ in range(30)))  # linear layers would fade to a constant
    drawn = figures.similarity_figure(compare(model, model, torch.arange(27.0).view(9, 3)))
    names = [label.get_text() for label in drawn.axes[0].get_xticklabels()]
    assert names == [str(i) for i in range(0, 30, 3)]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures_are_saved_by_the_end_of_their_name(tmp_path, plain, suffix):
    path = figures.save(figures.path_figure(plain.paths), tmp_path / f"x.{suffix}")
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(begin)
    with pytest.raises(OutputError, match="png, svg, pdf"):
        figures.save(figures.path_figure(plain.paths), tmp_path / "x.gif")
