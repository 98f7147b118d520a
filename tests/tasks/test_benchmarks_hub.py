"""The drift alarm: one real row of every data set on the hub has the columns that fixtures and readers have."""

from itertools import islice

import pytest

from retention.data.hub import open_source
from retention.data.source import SourceConfig
from retention.tasks.benchmarks import BENCHMARKS
from retention.tasks.benchmarks.schema import check_row
from tests.tasks.fixtures import images, texts

FIXTURES = {**texts.FIXTURES, **images.FIXTURES}
TABLES = [name for name, fixtures in FIXTURES.items() if fixtures[0].features is not None]
FILES = ["longmemeval", "mm_niah", "visual_haystacks"]


@pytest.mark.network
@pytest.mark.parametrize("name", TABLES)
def test_a_streamed_row_has_the_columns_of_the_fixture(name):
    source = BENCHMARKS[name]().source
    stream = open_source(SourceConfig(source.path, source.split, source.name, source.revision, streaming=True))
    row = next(islice(stream.after(0), 1))
    check_row(name, row, BENCHMARKS[name].schema)
    known = [set(fixture.features) for fixture in FIXTURES[name]]
    assert any(columns <= set(row) for columns in known), set(row)


@pytest.mark.network
@pytest.mark.parametrize("name", FILES)
def test_a_row_of_a_file_has_the_columns_of_the_fixture(name):
    task = BENCHMARKS[name]()
    check_row(name, task.rows[0], task.schema)
    assert set(FIXTURES[name][0].rows[0]) <= set(task.rows[0])
