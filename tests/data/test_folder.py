import numpy as np
import pytest

from ofa_jax.data.folder import FolderRows, ImageFolder
from ofa_jax.data.images import decode
from ofa_jax.data.tsv import BadRow
from tests.data.samples import encode, photograph


def write(path, content=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  kind = {"jpg": "JPEG", "png": "PNG"}.get(path.suffix.lower()[1:], "PNG")
  path.write_bytes(encode(photograph(50, 75), format=kind) if content is None else content)


def test_classes_and_files_are_in_the_originals_order(tmp_path):
  for name in ("2/b.png", "10/a.JPG", "2/a.jpg", "2/sub/0.png", "1/z.png"):
    write(tmp_path / name)
  write(tmp_path / "2" / "notes.txt", b"not counted")
  write(tmp_path / "label_cn.txt", b"not a class")
  folder = ImageFolder(tmp_path)
  assert folder.classes == ["1", "10", "2"]  # as strings: the reason for leading zeros
  names = [file.removeprefix(f"{tmp_path}/") for file in folder.files]
  assert names == ["1/z.png", "10/a.JPG", "2/a.jpg", "2/b.png", "2/sub/0.png"]
  np.testing.assert_array_equal(folder.labels, [0, 1, 2, 2, 2])

  rows = FolderRows(folder, size=32)
  example, blank = rows.example(1, None), rows.blank()
  np.testing.assert_array_equal(example["image"], decode(folder.encoded(1), size=32))
  assert example["label"] == 1
  assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
    k: (v.shape, v.dtype) for k, v in blank.items()
  }


def test_files_that_cannot_be_read_are_bad_rows(tmp_path):
  write(tmp_path / "0" / "a.tif", encode(photograph(50, 50), format="TIFF"))
  write(tmp_path / "0" / "b.png")
  rows = FolderRows(ImageFolder(tmp_path), size=32)
  with pytest.raises(BadRow, match=r"0/a\.tif: not a JPEG"):
    rows.example(0, None)
  (tmp_path / "0" / "b.png").unlink()
  with pytest.raises(BadRow, match=r"0/b\.png: .*No such file"):
    rows.example(1, None)


def test_faults_of_the_folder_are_errors_at_once(tmp_path):
  with pytest.raises(ValueError, match="no folder"):
    ImageFolder(tmp_path / "absent")
  with pytest.raises(ValueError, match="0 class folders"):
    ImageFolder(tmp_path)
  write(tmp_path / "0" / "a.png")
  (tmp_path / "1").mkdir()
  with pytest.raises(ValueError, match=r"2 class folders, 1 of them without any: 1\."):
    ImageFolder(tmp_path)
