"""Parameters and profiles: what is taken, what is refused, and in which words."""

import pytest

from prism_nb.params import (
    MODELS,
    ParamError,
    ProfileError,
    describe,
    for_notebook,
    known_keys,
    load_profile,
    notebook_name,
    validate,
)


@pytest.fixture
def profile(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_numbers_as_yaml_1_1_reads_them(profile):
    values = load_profile(
        profile("learning_rate: 1e-5\nnum_train_steps: 2e3\nedits: [add edema]\n")
    )
    assert values == {"learning_rate": 1e-5, "num_train_steps": 2000, "edits": ["add Edema"]}
    assert isinstance(values["num_train_steps"], int)


def test_an_empty_profile_is_all_defaults(profile):
    assert load_profile(profile("# nothing\n")) == {}
    assert validate("02_finetune", {}).num_train_steps == 24


def test_each_notebook_gets_the_keys_it_declares():
    values = {"seed": 3, "csv": "a.csv", "num_ddim_steps": 5}
    assert for_notebook(values, "03_invert") == {"seed": 3, "num_ddim_steps": 5}
    assert for_notebook(values, "01_caption") == {"seed": 3, "csv": "a.csv"}


@pytest.mark.parametrize(
    ("notebook", "values", "words"),
    [
        ("03_invert", {"num_ddim_steps": 0}, "num_ddim_steps = 0: allowed is from 1, up to 999"),
        ("03_invert", {"num_ddim_steps": 1.5}, "num_ddim_steps = 1.5"),
        ("03_invert", {"seed": True}, "seed = True: a number is needed, not true or false"),
        ("02_finetune", {"learning_rate": float("nan")}, "learning_rate = nan"),
        ("02_finetune", {"learning_rate": "fast"}, "learning_rate = 'fast': a number is needed"),
        ("02_finetune", {"learning_rate": "inf"}, "learning_rate = inf: allowed is above 0"),
        ("02_finetune", {"precision": "fp16"}, "precision = 'fp16': allowed is fp32 or bf16"),
        ("01_caption", {"image_size": 100}, "a multiple of 8"),
        ("01_caption", {"device_given_effusion": 0.5}, "from 0.567, up to 0.97"),
        ("01_caption", {"csv": "a{b}.csv"}, "without braces"),
        ("01_caption", {"csv": 3}, "text is needed"),
        ("01_caption", {"negatives": "yes"}, "true or false is needed"),
        ("04_edit", {"edits": []}, "edits = []"),
        ("04_edit", {"edits": ["erase Edema"]}, "add"),
        ("04_edit", {"edits": ["remove Cardiomegly"]}, "Cardiomegaly"),
        ("04_edit", {"edits": ["remove No Finding"]}, "follows from the others"),
        ("04_edit", {"edits": ["add Edema", "add edema"]}, "once only"),
        ("03_invert", {"guidance_scle": 1}, "unknown key guidance_scle"),
        ("04_edit", {"guidance_scle": 1}, "did you mean guidance_scale?"),
    ],
)
def test_a_bad_value_is_one_line_with_key_value_and_what_is_allowed(notebook, values, words):
    with pytest.raises(ParamError) as error:
        validate(notebook, values)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{notebook}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_ddim_step: 5\n", "unknown key num_ddim_step; did you mean num_ddim_steps?"),
        ("zzz: 5\n", "unknown key zzz; `prism-nb params` lists the keys"),
        ("seed: 1\ncsv: a.csv\nseed: 2\n", "seed stands on line 1 and 3; keep one"),
        ("- 1\n- 2\n", "is not a mapping"),
        ("just text\n", "is not a mapping"),
        ("seed: !!python/name:os.system\n", "the tag"),
        ("seed: !!str 1\n", "the tag"),
        ("seed: &a 1\nmax_films: *a\n", "anchors and aliases"),
        ("seed: [1\n", "is not valid YAML"),
        ("seed: {a: 1}\n", "seed = {'a': 1}"),
        ("seed: 2020-01-01\n", "seed = datetime.date(2020, 1, 1)"),
        ("seed: -1\n", "seed = -1: allowed is from 0"),
        ("#" * 70_000, "at most 64 KiB"),
    ],
)
def test_a_bad_profile_is_one_line_that_names_the_file(profile, text, words):
    path = profile(text)
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_home_that_is_nobodys_is_named_with_its_key(profile):
    assert load_profile(profile("csv: ~/films.csv"))["csv"] == "~/films.csv"
    with pytest.raises(ProfileError, match=r"csv = '~nosuch/x\.csv': there is no such user"):
        load_profile(profile("csv: ~nosuch/x.csv"))


def test_a_missing_or_binary_profile_is_named(tmp_path):
    with pytest.raises(ProfileError, match="No such file"):
        load_profile(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not UTF-8"):
        load_profile(tmp_path / "x.yaml")


def test_names_of_notebooks():
    assert notebook_name("04") == notebook_name("notebooks/04_edit.ipynb") == "04_edit"
    with pytest.raises(ParamError, match="did you mean 04_edit"):
        notebook_name("04_edti")


def test_every_parameter_has_a_remark_and_parameters_of_one_name_are_equal():
    seen = {}
    for notebook in MODELS:
        for row in describe(notebook):
            assert row["help"], row
            # papermill does not see a parameter whose remark holds an equals sign.
            assert "=" not in row["help"], row
            name = row["name"]
            same = {k: row[k] for k in ("type", "default", "allowed")}
            assert seen.setdefault(name, same) == same, name
    assert list(seen) == known_keys()


def test_the_notebooks_declare_these_parameters_with_these_defaults(root):
    papermill = pytest.importorskip("papermill")
    for path in sorted((root / "notebooks").glob("[0A]*.ipynb")):
        declared = papermill.inspect_notebook(path)
        rows = {row["name"]: row for row in describe(path.stem)}
        assert list(declared) == list(rows), path.name
        for name, row in rows.items():
            shown = declared[name]
            assert validate(path.stem, {name: eval(shown["default"])}) == validate(path.stem, {}), (
                f"{path.name}: {name} = {shown['default']}, the model has {row['default']!r}"
            )
            assert shown["help"], f"{path.name}: {name} has no remark"


@pytest.mark.parametrize("name", ["chexpert", "phantom", "real", "study"])
def test_no_profile_compares_with_a_gan_of_the_smoke_run(root, name):
    given = for_notebook(load_profile(root / "params" / f"{name}.yaml"), "05_evaluate")
    settings, smoke = validate("05_evaluate", given), validate("05_evaluate", {})
    assert settings.baseline == "bundled" or settings.baseline_steps >= 50 * smoke.baseline_steps
