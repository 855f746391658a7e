"""The folder of masks that clients may choose from: what is taken, and what is not. Needs no vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moesteer.backends.vllm.settings import settings_for
from moesteer.errors import FileError, LimitError, MaskError, MaskMismatchError, MoesteerError
from moesteer.serve.masks_dir import selectable
from tests.server.fakes import OTHER, PIN, additive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two masks, `other` and `pin`."""
    found = tmp_path / "masks"
    found.mkdir(mode=0o755)
    found.chmod(0o755)
    additive(OTHER).save(found / "other.safetensors")
    additive(PIN).save(found / "pin.safetensors")
    return found


def write(folder: Path, text: str) -> None:
    (folder / "masks.toml").write_text(text, encoding="utf-8")
    (folder / "masks.toml").chmod(0o644)


SHA = additive(OTHER).sha256
LISTED = f'[masks.harden]\nfile = "other.safetensors"\nsha256 = "{SHA}"\n'


def test_ids_are_file_names(folder: Path) -> None:
    (folder / "README.txt").write_text("not a mask")
    (folder / "sub").mkdir()
    assert selectable(folder) == {
        "other": (folder / "other.safetensors", None),
        "pin": (folder / "pin.safetensors", None),
    }


def test_other_strengths_have_ids_of_their_own(folder: Path) -> None:
    found = selectable(folder, alphas=(0.5, 2, 0.5, -1))
    assert set(found) == {f"{name}{more}" for name in ("other", "pin") for more in ("", ".0.5", ".2", ".-1")}
    assert found["pin.0.5"] == (folder / "pin.safetensors", 0.5) and found["pin"][1] is None


def test_a_list_names_what_is_offered_and_nothing_else(folder: Path) -> None:
    write(folder, LISTED + "alpha = 1.5\nalphas = [0.3, 0.6]\n")
    path = folder / "other.safetensors"
    assert selectable(folder) == {"harden": (path, 1.5), "harden.0.3": (path, 0.3), "harden.0.6": (path, 0.6)}
    write(folder, "[masks]\n")
    assert selectable(folder) == {}


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_that_others_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(FileError, match="others may write"):
        selectable(folder)


@pytest.mark.parametrize("name", ["other.safetensors", "masks.toml"])
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_write_to_is_refused(folder: Path, name: str, mode: int) -> None:
    write(folder, LISTED)
    (folder / name).chmod(mode)
    with pytest.raises(FileError, match="others may write"):
        selectable(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "other.safetensors", "masks.toml"])
def test_what_belongs_to_somebody_else_is_refused(folder: Path, name: str) -> None:
    write(folder, LISTED)
    os.chown(folder / name, 12345, -1)
    with pytest.raises(FileError, match="somebody else"):
        selectable(folder)


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    additive(PIN).save(outside)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FileError, match="link"):
        selectable(tmp_path / "link")
    for target in (outside, folder / "other.safetensors", tmp_path / "nothing", folder / "loop.safetensors"):
        link = folder / "loop.safetensors"
        link.symlink_to(target)
        with pytest.raises(FileError, match="link"):
            selectable(folder)
        link.unlink()


def test_a_list_that_is_a_link_is_refused_and_never_taken_for_no_list(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.toml").write_text(LISTED)
    for target in (tmp_path / "elsewhere.toml", tmp_path / "nothing"):
        (folder / "masks.toml").symlink_to(target)
        with pytest.raises(FileError, match="link"):
            selectable(folder)
        (folder / "masks.toml").unlink()


def test_what_is_no_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (
        folder / "other.safetensors",
        tmp_path / "nothing",
        tmp_path / "pipe",
        Path("/dev/null"),
        Path("a\0b"),
    ):
        with pytest.raises(FileError):
            selectable(path)


def test_what_is_no_regular_file_is_refused(folder: Path) -> None:
    for make in (os.mkfifo, os.mkdir):
        make(folder / "odd.safetensors")
        with pytest.raises(FileError, match="regular file"):
            selectable(folder)
        write(folder, LISTED.replace("other.safetensors", "odd.safetensors"))
        with pytest.raises(FileError, match="regular file"):
            selectable(folder)
        (folder / "masks.toml").unlink()
        (os.rmdir if make is os.mkdir else os.unlink)(folder / "odd.safetensors")


def test_another_mask_than_the_one_listed_is_refused(folder: Path) -> None:
    write(folder, LISTED)
    assert set(selectable(folder)) == {"harden"}
    additive({**OTHER, (0, 2): 1.5001}).save(folder / "other.safetensors")
    with pytest.raises(MaskMismatchError, match="listed"):
        selectable(folder)


def test_a_damaged_mask_is_refused(folder: Path) -> None:
    write(folder, LISTED)
    path = folder / "other.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole + b"\0", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], b"\x80\x04pickle"):
        path.write_bytes(data)
        with pytest.raises(MaskError):
            selectable(folder)
        with pytest.raises(MaskError):
            settings_for(masks={"other": (path, None)})


def test_a_file_of_17_mb_is_refused(folder: Path) -> None:
    write(folder, LISTED)
    with open(folder / "other.safetensors", "r+b") as handle:
        handle.truncate(17 << 20)
    with pytest.raises(LimitError):
        selectable(folder)
    with pytest.raises(LimitError):
        settings_for(masks=selectable_without_list(folder))
    write(folder, LISTED + "#" * (17 << 20))
    with pytest.raises(LimitError):
        selectable(folder)


def selectable_without_list(folder: Path) -> dict[str, tuple[Path, float | None]]:
    (folder / "masks.toml").unlink()
    return selectable(folder)


@pytest.mark.parametrize(
    "name",
    ["Other", "OTHER", "-x", ".x", "_x", "a b", "ä", "a\n", "a" * 65, "x;y", "x%2e", "..", "x'", "\u202ex", ""],
)
def test_names_that_are_no_ids_are_refused(folder: Path, name: str) -> None:
    additive(PIN).save(folder / f"{name}.safetensors")
    with pytest.raises(FileError, match="no mask id"):
        selectable(folder)
    (folder / f"{name}.safetensors").unlink()
    write(folder, LISTED.replace("harden", '"' + name.replace("\n", "\\n") + '"'))
    with pytest.raises(FileError, match="no mask id"):
        selectable(folder)


def test_strengths_that_make_no_id_are_refused(folder: Path) -> None:
    for alpha in (1e20, float("inf"), float("nan")):
        with pytest.raises(MoesteerError):
            settings_for(masks=selectable(folder, alphas=(alpha,)))


def test_two_masks_of_one_id_are_refused(folder: Path) -> None:
    additive({(0, 0): 9.0}).save(folder / "pin.0.5.safetensors")
    assert set(selectable(folder)) == {"other", "pin", "pin.0.5"}
    with pytest.raises(FileError, match="two masks"):
        selectable(folder, alphas=(0.5,))
    (folder / "pin.0.5.safetensors").unlink()
    with pytest.raises(FileError, match="two masks"):
        selectable(folder, alphas=(0.12345671, 0.12345672))


@pytest.mark.parametrize(
    "file",
    ["../pin.safetensors", "../../etc/passwd", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "./other.safetensors",
     "other.safetensors/", "pin", "pin.toml", "//pin.safetensors", "masks.toml", "..safetensors/../pin.safetensors"],
)  # fmt: skip
def test_a_list_names_no_path(folder: Path, file: str) -> None:
    write(folder, LISTED.replace("other.safetensors", file))
    with pytest.raises(FileError, match="names"):
        selectable(folder)


@pytest.mark.parametrize(
    "file", ["nothing.safetensors", "a\\u0000.safetensors", "a" * 300 + ".safetensors", "~.safetensors"]
)
def test_a_list_that_names_what_is_not_there_is_refused(folder: Path, file: str) -> None:
    write(folder, LISTED.replace("other.safetensors", file))
    with pytest.raises(FileError, match="cannot be read"):
        selectable(folder)


@pytest.mark.parametrize(
    "text",
    [
        "", "x = 1", "[mask.harden]", "masks = 1", "masks = []", "[[masks]]", LISTED + "note = 1\n",
        LISTED + 'path = "/x"\n',
        LISTED.replace(SHA, ""), LISTED.replace(SHA, SHA[:63]), LISTED.replace(SHA, SHA.upper()),
        LISTED.replace(SHA, SHA + "0"),
        "[masks.harden]\nfile = 'other.safetensors'\n", f"[masks.harden]\nsha256 = '{SHA}'\n", LISTED + LISTED,
        LISTED + "sha256 = 'x'\n", LISTED + "alpha = nan\n", LISTED + "alpha = inf\n", LISTED + "alpha = 'x'\n",
        LISTED + "alphas = 0.5\n", LISTED + "alphas = ['x']\n", LISTED + "alphas = [nan]\n",
        LISTED + "alphas = [inf]\n",
        LISTED + "[other]\n", LISTED.replace('"', ""), "a = " + "[" * 20_000, LISTED + "\0",
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_a_list_is_read_strictly(folder: Path, text: str) -> None:
    write(folder, text)
    with pytest.raises(FileError):
        selectable(folder)


def test_a_list_is_utf_8(folder: Path) -> None:
    (folder / "masks.toml").write_bytes(b"\xff\xfe" + LISTED.encode("utf-16-le"))
    with pytest.raises(FileError):
        selectable(folder)
