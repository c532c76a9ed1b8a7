import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnunetv2_kaf.errors import KAFError
from pretraining import cli as pretrain_cli
from semisupervised import cli
from semisupervised.trainer import nnUNetTrainerKAFSemi
from semisupervised.unlabelled import Training, find_unlabelled
from semisupervised.unlabelled_list import list_file

OPTIONS = "--dataset 321 -c 2d --epochs 1 --iterations 1 --batch-size 2 --device cpu --num-workers 1"
PRETRAIN = OPTIONS.split()


def training(**changes):
    values = {
        "dataset_name": "Dataset321_Small", "configuration": "2d", "plans_name": "nnUNetPlans", "network": "kaf",
        "fold": 0, "train": ("p0", "p1"), "validation": ("p2",), "pretraining": None,
    }  # fmt: skip
    return Training(**{**values, **changes})


@pytest.fixture
def raw(make_dataset, tmp_path):
    """A folder of raw images beside the dataset: two patients of their own, and one of the name of a validation one."""
    dataset = make_dataset()
    folder = tmp_path / "more"
    folder.mkdir()
    for i, case in enumerate(("q0", "q1", "p2_late")):
        write(folder / f"{case}_0000.nii.gz", i)
    return dataset, folder


def write(path, seed, shape=(9, 20, 28)):
    volume = sitk.GetImageFromArray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    volume.SetSpacing((1.0, 1.0, 4.0))
    sitk.WriteImage(volume, str(path))


def test_the_dataset_itself_gives_what_the_fold_does_not_name(make_dataset):
    make_dataset()
    found = find_unlabelled(training())
    assert found.images.cases == ("p3", "p4", "p5")
    assert found.labelled == 0
    other = find_unlabelled(training(train=("p0", "p1", "p4")))
    assert other.images.cases == ("p3", "p5")


def test_folders_are_preprocessed_and_validation_patients_left_out(raw, monkeypatch):
    _, folder = raw
    monkeypatch.setenv("KAF_UNLABELLED", f"{folder}{os.pathsep}321")
    found = find_unlabelled(training())
    names = [case.rpartition("/")[2] for case in found.images.cases]
    assert names == ["p3", "p4", "p5", "q0", "q1"]
    assert found.to_dict()["count"] == 5
    assert all(Path(file).suffix == ".b2nd" for file in found.images.further.values())
    reader = found.images.open()
    assert reader.shape(found.images.cases[-1]) == (1, 9, 20, 28)


def test_a_bad_image_is_named_with_the_way_around_it(raw, monkeypatch):
    _, folder = raw
    (folder / "broken_0000.nii.gz").write_bytes(b"no image")
    monkeypatch.setenv("KAF_UNLABELLED", str(folder))
    with pytest.raises(KAFError, match=r"(?s)1 bad image.*broken_0000.*--skip-bad is an option of kaf-unlabelled"):
        find_unlabelled(training())


def test_names_that_are_neither_dataset_nor_folder_are_refused(make_dataset, monkeypatch):
    make_dataset()
    for text, message in (("/no/such", "no folder"), ("77", "77 not found"), (os.pathsep, "names none")):
        monkeypatch.setenv("KAF_UNLABELLED", text)
        with pytest.raises(KAFError, match=message):
            find_unlabelled(training())


def test_the_list_of_the_command_is_used_where_nothing_else_is_said(raw, monkeypatch, capsys):
    dataset, folder = raw
    monkeypatch.setenv("KAF_UNLABELLED", "")
    assert cli.main(["--dataset", "321", "--images", str(folder), "--num-workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "Dataset321_Small, 2d: 3 unlabelled images" in out
    found = find_unlabelled(training())
    assert [case.rpartition("/")[2] for case in found.images.cases] == ["q0", "q1"]
    assert list(found.left_out.values()) == [["p2_late"]]
    assert "the list of kaf-unlabelled" in found.origin
    # what kaf-pretrain prepares is the same files
    before = sorted(dataset.folder.rglob("*.b2nd"))
    assert pretrain_cli.main([*PRETRAIN, "--images", str(folder)]) == 0
    assert sorted(dataset.folder.rglob("*.b2nd")) == before
    both = find_unlabelled(training())
    names = {case.rpartition("/")[2] for case in both.images.cases}
    assert names >= {"q0", "q1"}
    assert len(names & {"p0", "p1", "p3", "p4", "p5"}) >= 4, "the pretraining holds one patient out"
    assert len(set(both.images.cases)) == len(both.images.cases)
    assert both.labelled == len(names & {"p0", "p1"})


def test_scans_of_validation_patients_are_found_by_the_pattern_that_is_given(raw, monkeypatch, capsys):
    _, folder = raw
    monkeypatch.setenv("KAF_UNLABELLED", "")
    write(folder / "p2-2019-03-01_0000.nii.gz", 9)
    command = ["--dataset", "321", "--images", str(folder), "--num-workers", "1"]

    def names():
        return [case.rpartition("/")[2] for case in find_unlabelled(training()).images.cases]

    assert cli.main(command) == 0
    assert names() == ["p2-2019-03-01", "q0", "q1"]
    assert cli.main([*command, "--patient-pattern", r"(p\d).*"]) == 0
    assert names() == ["q0", "q1"]
    assert list(find_unlabelled(training()).left_out.values()) == [["p2-2019-03-01", "p2_late"]]
    monkeypatch.setenv("KAF_UNLABELLED", str(folder))
    assert names() == ["q0", "q1"], "also of images that are named otherwise"
    monkeypatch.setenv("KAF_UNLABELLED", "")
    # a pretraining that goes by the default pattern does not undo that
    assert pretrain_cli.main([*PRETRAIN, "--images", str(folder)]) == 0
    assert "p2-2019-03-01" not in names()
    capsys.readouterr()
    assert cli.main([*command, "--patient-pattern", "p"]) == 2
    assert "--patient-pattern is 'p'; expected a group" in capsys.readouterr().err


def test_the_command_works_with_closed_streams(raw, monkeypatch):
    _, folder = raw
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["--dataset", "321", "--images", str(folder), "--num-workers", "1"]) == 0


def test_a_damaged_list_says_how_to_make_it_again(raw, monkeypatch):
    _, folder = raw
    monkeypatch.setenv("KAF_UNLABELLED", "")
    assert cli.main(["--dataset", "321", "--images", str(folder)]) == 0
    (file,) = Path(os.environ["nnUNet_preprocessed"]).rglob("unlabelled.json")  # noqa: SIM112
    good = json.loads(file.read_text())
    outside = {"images": {"a/b": "../nnUNetPlans_2d/p0.b2nd"}}
    pattern = json.dumps({**good, "patient_pattern": "("})
    wrong = ("[", "{}", '{"images": {}}', '{"images": {"a": 3}}', '{"images": ["a"]}', json.dumps(outside), pattern)
    for content in wrong:
        file.write_text(content)
        with pytest.raises(KAFError, match=r"unlabelled\.json.*Run kaf-unlabelled --dataset 321"):
            find_unlabelled(training())
    file.write_text(json.dumps(good))
    next(path for path in file.parent.rglob("*.b2nd")).unlink()
    with pytest.raises(KAFError, match="1 of 3 images are gone"):
        find_unlabelled(training())


def test_bad_input_of_the_command_is_one_line(raw, capsys):
    _, folder = raw
    (folder / "broken_0000.nii.gz").write_bytes(b"no image")
    for arguments, message in (
        (["-d", "321"], "nothing to prepare"),
        (["-d", "322", "--images", str(folder)], "322 not found"),
        (["-d", "321", "--images", str(folder), "-c", "2D"], "no configuration '2D'"),
        (["-d", "321", "--images", str(folder), "-p", "other"], "Plans other not found"),
        (["-d", "321", "--images", str(folder), "--num-workers", "0"], "--num-workers is 0"),
        (["-d", "321", "--images", str(folder)], "1 bad image"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert cli.main(["-d", "321", "--images", str(folder), "--skip-bad"]) == 0
    assert "3 unlabelled images" in capsys.readouterr().out


def test_the_images_of_the_pretraining_are_the_default(raw, monkeypatch):
    dataset, folder = raw
    monkeypatch.setenv("KAF_UNLABELLED", "")
    assert pretrain_cli.main([*PRETRAIN, "--images", str(folder)]) == 0
    trainer = dataset.trainer(nnUNetTrainerKAFSemi)
    trainer.run_training()
    record = json.loads((Path(trainer.output_folder) / "semi_unlabelled.json").read_text())
    names = {case.rpartition("/")[2] for case in record["cases"]}
    everything = {"p0", "p1", "p3", "p4", "p5", "q0", "q1"}
    assert names < everything, "the pretraining holds one patient out"
    assert len(names) == 6
    assert record["of_these_labelled_in_this_fold"] == len(names & {"p0", "p1"})
    assert "KAFPretraining__nnUNetPlans__2d" in record["origin"]
    start = json.loads((Path(trainer.output_folder) / "kaf_initialization.json").read_text())
    assert start["tensors_loaded"] > 10
    assert not list_file(trainer_task()).exists()
    # without the cached files it cannot go on, and says so
    for file in dataset.folder.glob("*_kaf_images/*/q?-*.b2nd"):
        file.unlink()
    with pytest.raises(KAFError, match=r"of 6 preprocessed images that the pretraining .* used are gone"):
        find_unlabelled(training())


def trainer_task():
    from pretraining.task import resolve_task

    return resolve_task("321", "2d", "nnUNetPlans")


def test_a_pretraining_on_another_dataset_names_no_images_here(make_dataset, monkeypatch, tmp_path):
    dataset = make_dataset()
    monkeypatch.setenv("KAF_UNLABELLED", "")
    assert pretrain_cli.main([*PRETRAIN, "--output", str(tmp_path / "elsewhere")]) == 0
    path = tmp_path / "elsewhere" / "checkpoint_final.pth"
    found = find_unlabelled(training(pretraining=path))
    assert len(set(found.images.cases) & {"p0", "p1", "p3", "p4", "p5"}) == 4
    other = dataset.folder.with_name("Dataset322_Other")
    dataset.folder.rename(other)
    plans = json.loads((other / "nnUNetPlans.json").read_text())
    (other / "nnUNetPlans.json").write_text(json.dumps({**plans, "dataset_name": "Dataset322_Other"}))
    with pytest.raises(KAFError, match=r"used images of \('Dataset321_Small', '2d'\).*KAF_UNLABELLED"):
        find_unlabelled(training(dataset_name="Dataset322_Other", pretraining=path))
    # its weights can still be the start, where other images are listed
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "q0_0000.nii.gz", 0)
    assert cli.main(["--dataset", "322", "--images", str(tmp_path / "more"), "-c", "2d"]) == 0
    found = find_unlabelled(training(dataset_name="Dataset322_Other", pretraining=path))
    assert [case.rpartition("/")[2] for case in found.images.cases] == ["q0"]
    assert "the list of kaf-unlabelled" in found.origin
