"""Answers to extract features from."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hass_core.config import parse_config
from hass_core.data.responses import RESPONSES_SCHEMA


def responses_artifact(store, rows, parts=1):
    folder = store.stage("responses", {"rows": len(rows), "parts": parts})
    size = -(-len(rows) // parts)
    for i in range(parts):
        part = rows[i * size : (i + 1) * size]
        with folder.writing(f"part-{i:05d}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(part, RESPONSES_SCHEMA), file.path)
            file.rows = len(part)
    return folder.finish({})


def conversation(name, question="What is it?", answer="It is a test.", **other):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = {"id": name, "category": "c", "source": "s", "messages": messages, "answer_token_ids": [[]]}
    return row | {"finished": True, "num_new_tokens": 3, "temperature": 0.0} | other


@pytest.fixture
def rows():
    return [conversation(f"c{i}", answer="word " * (i % 7 + 1) + "end") for i in range(30)]


@pytest.fixture
def config():
    return parse_config({"features": {"validation_fraction": 0.2}})
