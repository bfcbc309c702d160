"""Curricula: the built-in ones parse, the errors name the field, the steps add up."""

import pytest

from model.data import BUILTIN_CURRICULA, Curriculum, DataError, SourceSpec, Stage, iter_documents, load_curriculum


def corpora(folder):
    folder.mkdir(exist_ok=True)
    for name in ("dictionary.txt", "stories.md", "encyclopedia.jsonl"):
        text = '{"text": "encyclopedia"}' if name.endswith("jsonl") else name.split(".")[0]
        (folder / name).write_text(text)
    return folder


def stages(*shares):
    return tuple(Stage(f"s{i}", SourceSpec(files="x"), share, 0.5) for i, share in enumerate(shares))


def read(curriculum):
    return [b"".join(iter_documents(stage.source)).decode() for stage in curriculum.stages]


@pytest.mark.parametrize("name", ["pydoc", "english", "turkish", "local", "recall"])
def test_built_in_curricula(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpora(tmp_path / "corpora")
    curriculum = load_curriculum(name)
    assert curriculum.name == name and name in BUILTIN_CURRICULA and len(BUILTIN_CURRICULA) == 5
    assert [stage.share for stage in curriculum.stages] == [0.15, 0.25, 0.60]
    assert [stage.plasticity for stage in curriculum.stages] == [0.1, 0.5, 0.99]
    assert curriculum.boundaries(1000) == [150, 400, 1000]
    # Where recall is learned there are more tasks than where it is only kept.
    shares = [stage.recall.share for stage in curriculum.stages]
    assert shares[0] == shares[1] > shares[2] > 0 if name == "recall" else shares == [0, 0, 0]
    described = curriculum.describe()
    assert all(stage.name in described and stage.source.label in described for stage in curriculum.stages)


@pytest.mark.parametrize("name", ["local", "recall"])
def test_local_without_corpora(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=name + r".*\./corpora.*dictionary\.\*"):
        load_curriculum(name)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "stories.md").write_text("one of three")
    if name == "local":
        assert read(load_curriculum(name)) == ["one of three"]
    else:
        with pytest.raises(DataError, match=r"recall: folder corpora: accepted is one that holds dictionary\.\*, stor"):
            load_curriculum(name)
    # A curriculum of the folder's own is `local`.
    (tmp_path / "corpora" / "curriculum.toml").write_text(
        '[[stages]]\nname = "all"\nsource = "stories.md"\nshare = 1.0\nplasticity = 0.5\n'
    )
    assert load_curriculum("local").stages[0].name == "all"
    corpora(tmp_path / "corpora")
    assert load_curriculum(name).stages[-1].name == ("all" if name == "local" else "encyclopedia")


def test_folder_of_three_files(tmp_path):
    curriculum = load_curriculum(corpora(tmp_path / "my [corpora]*"))
    assert read(curriculum) == ["dictionary", "stories", "encyclopedia"]
    (tmp_path / "my [corpora]*" / "stories.txt").write_text("again")
    with pytest.raises(DataError, match=r"2 files for stories"):
        load_curriculum(tmp_path / "my [corpora]*")


def test_any_other_file_or_folder_is_one_stage(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for path in (tmp_path / "a.txt", tmp_path, str(tmp_path)):
        (stage,) = load_curriculum(path).stages
        assert (stage.name, stage.share, stage.plasticity, stage.crops) == ("local", 1.0, 0.99, "any")
        assert list(iter_documents(stage.source)) == [b"hello"]


TOML = """
name = "mine"
[[stages]]
name = "one"
source = "texts/*.txt"
share = 0.25
plasticity = 0
seq_len = 256
crops = "document"
[[stages]]
name = "two"
source = { files = ["texts/a.txt", "d.jsonl"], template = "{w}: {m}" }
share = 0.75
plasticity = 1
"""


def test_toml_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    base = tmp_path / "[odd]"
    (base / "texts").mkdir(parents=True)
    (base / "texts" / "a.txt").write_text("aa")
    (base / "texts" / "b.txt").write_text("bb")
    (base / "d.jsonl").write_text('{"w": "ev", "m": "house"}')
    (base / "curriculum.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    for path in (base / "curriculum.toml", base, "[odd]"):
        curriculum = load_curriculum(path)
        assert read(curriculum) == ["aabb", "aaev: house"]
    assert curriculum.stages[0].seq_len == 256 and curriculum.stages[0].crops == "document"
    assert curriculum.stages[1].seq_len is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', "nmae = 1", "unknown key 'nmae'; accepted are name, stages"),
        ('name = "mine"', "name = 3", "name=3"),
        ("share = 0.25", "share = 0.3", "share sums to 1.05"),
        ("share = 0.25", 'share = "a"', "stage one: field share='a'"),
        ("share = 0.25", "", "stage one: field share is missing"),
        ("share = 0.25", "share = 0.25\nshares = 1", "stage one: unknown key 'shares'"),
        ("plasticity = 1", "plasticity = 1.5", "stage two: field plasticity=1.5"),
        ("seq_len = 256", "seq_len = 0", "stage one: field seq_len=0"),
        ('crops = "document"', 'crops = "all"', "stage one: field crops='all': accepted is any or document"),
        ('"texts/*.txt"', "3", "stage one: field source=3"),
        ('"texts/*.txt"', '""', "stage one: source field files="),
        ('"texts/*.txt"', "{ flies = 'x' }", "stage one, source: unknown key 'flies'; accepted are files, hub"),
        ('"texts/*.txt"', "{ builtin = 'no' }", "stage one: source field builtin='no'"),
        ('name = "two"', 'name = "one"', "different names"),
        ("[[stages]]", "[[", "not valid TOML"),
    ],
)
def test_toml_errors_name_the_field(tmp_path, old, new, message):
    (tmp_path / "c.toml").write_text(TOML.replace(old, new))
    with pytest.raises(DataError) as caught:
        load_curriculum(tmp_path / "c.toml")
    assert message in str(caught.value) and "c.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_toml_without_stages(tmp_path):
    for text in ("", "stages = 3", "stages = []"):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(DataError, match="stages"):
            load_curriculum(tmp_path / "c.toml")


def test_unknown_name_says_what_is_accepted():
    with pytest.raises(DataError, match=r"'nope'.*english, local, pydoc, recall, turkish.*\.toml"):
        load_curriculum("nope")


@pytest.mark.parametrize("shares", [(1.0,), (0.15, 0.25, 0.6), (0.001, 0.998, 0.001), (0.001, 0.999), (0.1,) * 10])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100, 999, 10**6])
def test_boundaries(shares, total):
    curriculum = Curriculum("c", stages(*shares))
    ends = curriculum.boundaries(total)
    steps = [end - begin for begin, end in zip([0, *ends], ends)]
    assert len(ends) == len(shares) and ends[-1] == total and min(steps) >= 0
    if total >= len(shares):
        assert min(steps) >= 1
    if total >= 1000:
        assert all(abs(step - share * total) <= 1 for step, share in zip(steps, shares))
    at = [curriculum.stage_at(step, total) for step in range(min(total, 1000))]
    assert at == [next(i for i, end in enumerate(ends) if step < end) for step in range(min(total, 1000))]
    assert curriculum.stage_at(total + 5, total) == len(shares) - 1


def test_step_errors():
    curriculum = Curriculum("c", stages(1.0))
    for call in (lambda: curriculum.boundaries(0), lambda: curriculum.stage_at(-1, 5), lambda: Curriculum("c", ())):
        with pytest.raises(DataError, match="accepted"):
            call()
