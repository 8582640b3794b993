"""What a killed writer leaves behind, and nothing else, is removed."""

from pathlib import Path

from internlm_lib.files import atomic_path, remove_abandoned


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    names = []
    for target in (tmp_path / "config.json", tmp_path / "part" / "folder"):
        with atomic_path(target) as temporary:
            names.append(temporary.relative_to(tmp_path))
            temporary.write_text("whole")
    kept = ["config.json", "part/folder", ".hidden.json", "a.12.tmp.json", ".x.tmp.json"]
    for name in [*map(str, names), *kept]:
        (tmp_path / name).write_text("half")
    remove_abandoned(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(kept)
