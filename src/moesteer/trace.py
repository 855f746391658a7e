"""Traces on disk: router logits and selections of chosen tokens, streamed to shards, resumable byte for byte.

    TRACE/manifest.json           what it is of; `complete` once all shards are there, with their sha256
    TRACE/index.parquet           a row per sequence (written last): where its tokens are and what they are
    TRACE/shards/NNNNNN.safetensors   logits [tokens, L, E] float16, selected [tokens, L, K] uint8 or uint16,
                                  token_ids [tokens] int32; its own index rows in the metadata

A shard is written whole and renamed, and holds the same sequences whenever it is made; so a killed capture
goes on after its last whole shard and ends in the same bytes. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from moesteer import files
from moesteer.errors import FileError, NanLogitsError, RunDirectoryError, TraceFileError
from moesteer.fingerprint import Fingerprint

METADATA_KEY = "moesteer"
FLOAT16_MAX = 65504.0


class Manifest(BaseModel):
    """A trace's manifest. plan_sha256: digest of what is to be captured; a trace resumes only its own plan.

    sigma_L: standard deviation of each layer's logits over all kept tokens and experts, once complete.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    fingerprint: Fingerprint
    mask_sha256: tuple[str, ...] = ()
    level: Literal["logits", "selected"]
    spans: tuple[str, ...]
    sequences: int
    shards: int
    plan_sha256: str
    complete: bool = False
    shard_sha256: tuple[str, ...] = ()
    tokens: int = 0
    sigma_L: tuple[float, ...] = ()


@dataclass(frozen=True)
class TraceRow:
    """One sequence in a trace. Its tokens are `length` rows from `offset` of shard `shard`.

    span_names, span_lengths: the kept spans in the order their tokens stand.
    """

    id: str
    group: str
    label: str | None
    tactic: str | None
    split: str | None
    shard: int
    offset: int
    length: int
    span_names: tuple[str, ...]
    span_lengths: tuple[int, ...]

    def span(self, name: str) -> slice | None:
        """Rows of one span within the sequence's own tokens, or None if it was not kept."""
        start = 0
        for found, length in zip(self.span_names, self.span_lengths, strict=True):
            if found == name:
                return slice(start, start + length)
            start += length
        return None


def selected_dtype(experts: int) -> Any:
    """uint8 where expert ids fit into it, else uint16."""
    return np.uint8 if experts <= 256 else np.uint16


class TraceWriter:
    """Writes a trace's shards in order.

    `done`: number of whole shards found there already. `complete`: whether that trace was finished.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.complete = False
        path = self.folder / "manifest.json"
        if path.exists():
            found = _read_manifest(self.folder)
            if found.plan_sha256 != manifest.plan_sha256:
                raise RunDirectoryError(
                    "the folder holds a trace of something else",
                    where=str(self.folder),
                    expected="an empty folder, or the same capture to go on with",
                    do="choose another --out, or delete that trace",
                )
            self.complete = found.complete
        elif self.folder.exists() and not all(_is_beginning(entry.name) for entry in self.folder.iterdir()):
            raise RunDirectoryError(
                "the folder is not empty and holds no trace",
                where=str(self.folder),
                expected="an empty folder, or the same capture to go on with",
                do="choose another --out",
            )
        else:
            files.write_json(path, manifest.model_dump(mode="json"))
        files.remove_temporaries(self.folder)
        self.done = 0
        while shard_path(self.folder, self.done).exists():
            self.done += 1

    def write_shard(
        self,
        rows: Sequence[TraceRow],
        *,
        selected: NDArray[Any],
        token_ids: NDArray[np.int32],
        logits: NDArray[np.float32] | None,
    ) -> None:
        """Write the next shard. logits [tokens, L, E]; raises NanLogitsError where they are not finite."""
        arrays: dict[str, NDArray[Any]] = {"selected": selected, "token_ids": token_ids}
        sums: dict[str, Any] = {"tokens": len(token_ids)}
        if logits is not None:
            _require_finite(logits, rows, self.manifest.fingerprint.layer_ids)
            stored = logits.astype(np.float16)
            exact = stored.astype(np.float64)
            arrays["logits"] = stored
            sums |= {"sum": exact.sum(axis=(0, 2)).tolist(), "squares": (exact**2).sum(axis=(0, 2)).tolist()}
        meta = {"rows": [asdict(row) for row in rows], "sums": sums, "plan": self.manifest.plan_sha256}
        data = save_tensors(arrays, metadata={METADATA_KEY: files.dumps(meta, indent=None)})
        files.write_bytes(shard_path(self.folder, self.done), data)
        self.done += 1

    def finish(self) -> Manifest:
        """Write index and manifest from the shards on disk; the trace is complete."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows: list[dict[str, Any]] = []
        digests: list[str] = []
        tokens, total, squares = 0, np.zeros(()), np.zeros(())
        for number in range(self.manifest.shards):
            data = files.read_bytes(shard_path(self.folder, number), kind="shard")
            digests.append(files.sha256(data))
            meta = _shard_metadata(shard_path(self.folder, number))
            if meta["plan"] != self.manifest.plan_sha256:
                raise _broken(self.folder, f"shard {number} belongs to another capture")
            rows += meta["rows"]
            tokens += meta["sums"]["tokens"]
            total = total + np.array(meta["sums"].get("sum", 0.0))
            squares = squares + np.array(meta["sums"].get("squares", 0.0))
        sigma: tuple[float, ...] = ()
        if self.manifest.level == "logits" and tokens:
            count = tokens * self.manifest.fingerprint.experts
            variance = np.asarray(squares / count - (total / count) ** 2)
            sigma = tuple(float(x) for x in np.sqrt(np.maximum(variance, 0.0)))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_index_schema()), sink, compression="zstd")
        files.write_bytes(self.folder / "index.parquet", sink.getvalue().to_pybytes())
        done = self.manifest.model_copy(
            update={"complete": True, "shard_sha256": tuple(digests), "tokens": tokens, "sigma_L": sigma}
        )
        files.write_json(self.folder / "manifest.json", done.model_dump(mode="json"))
        return done


class TraceReader:
    """A complete trace. `rows` are its sequences; tokens are read shard by shard, never all at once."""

    def __init__(self, folder: Path | str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        if not self.manifest.complete:
            raise _broken(self.folder, "the capture did not finish", do="run the same capture again: it goes on")
        for number in range(self.manifest.shards):
            if not shard_path(self.folder, number).exists():
                raise _broken(self.folder, f"shard {number} is missing")
        try:
            table = pq.read_table(pa.BufferReader(files.read_bytes(self.folder / "index.parquet", kind="shard")))
            self.rows = tuple(
                TraceRow(**{**row, "span_names": tuple(row["span_names"]), "span_lengths": tuple(row["span_lengths"])})
                for row in table.to_pylist()
            )
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise _broken(self.folder, f"index.parquet cannot be read ({error})") from error
        if len(self.rows) != self.manifest.sequences:
            raise _broken(self.folder, f"index has {len(self.rows)} sequences of {self.manifest.sequences}")

    @property
    def fingerprint(self) -> Fingerprint:
        """The model the trace was captured from."""
        return self.manifest.fingerprint

    @property
    def sigma_L(self) -> NDArray[np.float32]:
        """Per-layer standard deviation of router logits, over all kept tokens."""
        return np.array(self.manifest.sigma_L, dtype=np.float32)

    def sequences(
        self, wanted: set[str] | None = None, *, tensors: Sequence[str] | None = None
    ) -> Iterator[tuple[TraceRow, Mapping[str, NDArray[Any]]]]:
        """Each sequence (of the ids wanted) with its arrays `logits`, `selected`, `token_ids`, in shard order.

        tensors: read only these; logits are far larger than the rest.
        """
        by_shard: dict[int, list[TraceRow]] = {}
        for row in self.rows:
            if wanted is None or row.id in wanted:
                by_shard.setdefault(row.shard, []).append(row)
        for number in sorted(by_shard):
            arrays = self._shard(number, tensors)
            for row in by_shard[number]:
                part = slice(row.offset, row.offset + row.length)
                if part.stop > len(next(iter(arrays.values()))):
                    raise _broken(self.folder, f"shard {number} is shorter than the index says")
                yield row, {name: array[part] for name, array in arrays.items()}

    def _shard(self, number: int, tensors: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        path = shard_path(self.folder, number)
        try:
            with safe_open(path, framework="numpy") as shard:
                shapes = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
                wanted = set(shapes) if tensors is None else set(shapes) & set(tensors)
                arrays = {name: shard.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError) as error:
            raise _broken(self.folder, f"shard {number} cannot be read ({error})") from error
        fingerprint = self.fingerprint
        shape = (shapes.get("token_ids", (0,))[0], len(fingerprint.layer_ids))
        expected = {"selected": (*shape, fingerprint.top_k), "token_ids": shape[:1]}
        if self.manifest.level == "logits":
            expected["logits"] = (*shape, fingerprint.experts)
        if shapes != expected:
            raise _broken(self.folder, f"shard {number} has other tensors than the manifest says")
        return arrays

    def verify(self) -> list[str]:
        """Files whose bytes are not those that were captured, by name; empty when all is well."""
        return [
            f"shards/{number:06d}.safetensors"
            for number, digest in enumerate(self.manifest.shard_sha256)
            if files.sha256(files.read_bytes(shard_path(self.folder, number), kind="shard")) != digest
        ]


def _is_beginning(name: str) -> bool:
    """Whether a file is what a capture leaves that was killed before its manifest had its name."""
    return name.startswith(".manifest.json.") and name.endswith(files.TEMPORARY_SUFFIX)


@dataclass(frozen=True)
class Captured:
    """How far a capture is: whole shards in a row, shards planned, and whether it was finished."""

    done: int
    shards: int
    complete: bool


def captured(folder: Path) -> Captured:
    """How far the capture of a trace is. Raises TraceFileError for a trace that is damaged."""
    manifest = _read_manifest(folder)
    done = 0
    while done < manifest.shards and shard_path(folder, done).exists():
        if _shard_metadata(shard_path(folder, done)).get("plan") != manifest.plan_sha256:
            raise _broken(folder, f"shard {done} belongs to another capture")
        done += 1
    return Captured(done, manifest.shards, manifest.complete)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / "shards" / f"{number:06d}.safetensors"


def _index_schema() -> Any:
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    names = {"id": text, "group": text, "label": text, "tactic": text, "split": text}
    places = {"shard": whole, "offset": whole, "length": whole}
    spans = {"span_names": pa.list_(text), "span_lengths": pa.list_(whole)}
    return pa.schema({**names, **places, **spans})


def _shard_metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as shard:
            meta = files.parse_json(shard.metadata()[METADATA_KEY])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(path.parent.parent, f"{path.name} cannot be read ({error})") from error
    assert isinstance(meta, dict)
    return meta


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest.model_validate(files.read_json(folder / "manifest.json"))
    except ValidationError as error:
        raise _broken(folder, f"manifest.json is wrong: {error.errors()[0]['msg']}") from error
    except FileError as error:
        raise _broken(folder, f"no readable manifest.json ({error.what})") from error


def _require_finite(logits: NDArray[np.float32], rows: Sequence[TraceRow], layer_ids: Sequence[int]) -> None:
    bad = np.argwhere(~np.isfinite(logits) | (np.abs(logits) > FLOAT16_MAX))
    if not len(bad):
        return
    token, layer, expert = (int(x) for x in bad[0])
    row = next((r for r in rows if r.offset <= token < r.offset + r.length), None)
    raise NanLogitsError(
        f"router logits hold {logits[token, layer, expert]}",
        where=f"sequence {row.id if row else '?'}, layer {layer_ids[layer]}, expert {expert}",
        expected="finite numbers within float16",
        do="check the model's weights, or load it with another --dtype",
    )


def _broken(folder: Path, what: str, *, do: str = "capture it again, or restore the folder") -> TraceFileError:
    return TraceFileError(what, where=str(folder), expected="a whole trace as `moesteer capture` writes it", do=do)
