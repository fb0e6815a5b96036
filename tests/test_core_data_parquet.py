"""Files of Parquet, as Hugging Face's `datasets` writes them: which of them a part is."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import one_test
from PIL import Image

from doconv_core.training.data import DataError, open_data

CLASSES = ["cat", "dog"]


def write(file, level, count):
    """Write images of one grey level, and labels whose names are told in the metadata."""
    stored = BytesIO()
    Image.new("RGB", (4, 4), (level,) * 3).save(stored, "PNG")
    rows = {
        "image": [{"bytes": stored.getvalue(), "path": None}] * count,
        "label": [n % 2 for n in range(count)],
    }
    told = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    table = pa.table(rows).replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, file, row_group_size=2)


@one_test
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"], 1),
        (["train-00000-of-00001", "test-00000-of-00001"], 1),
        (["train", "test", "validation"], 2),
    ],
)
def test_a_test_part_is_no_more_of_the_validation_part(names, expected, tmp_path):
    for level, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", level, 3 + level)
    data = open_data("parquet", tmp_path)
    assert (len(data.train), len(data.val)) == (3, 3 + expected)
    assert data.classes == tuple(CLASSES)
    assert data.train.labels.tolist() == [0, 1, 0]
    for level, source in ((0, data.train), (expected, data.val)):
        for n in range(len(source)):
            assert np.asarray(source.image(n)).tolist() == [[[level] * 3] * 4] * 4


def test_files_in_several_pieces_are_one_part(tmp_path):
    (tmp_path / "data").mkdir()
    for n, count in enumerate((3, 2)):
        write(tmp_path / "data" / f"train-0000{n}-of-00002.parquet", n, count)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", 9, 1)
    train = open_data("parquet", tmp_path).train
    levels = [int(np.asarray(train.image(n)).max()) for n in range(len(train))]
    assert levels == [0, 0, 0, 1, 1]
    assert train.name(4) == f"row 1 of group 0 of {tmp_path / 'data'}/train-00001-of-00002.parquet"


def test_a_part_that_is_missing_is_named(tmp_path):
    write(tmp_path / "train.parquet", 0, 2)
    with pytest.raises(DataError, match=r"has no val-\*\.parquet; put train-\*\.parquet and"):
        open_data("parquet", tmp_path)
