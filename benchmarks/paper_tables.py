"""Recompute the KV-cache sizes and parameter counts that three MLA conversion papers print.

    python benchmarks/paper_tables.py [--output benchmarks/results/paper_tables.json]

Papers: MHA2MLA (arXiv 2502.14837v1), X-EcoMLA (arXiv 2503.11132v4) and TransMLA (arXiv 2502.07864v1). The script needs
no weights and no network: the models are rows of numbers from their public `config.json`, and every computed value
comes from `optimum_mla.core.geometry`. It prints each printed figure beside the computed one and exits with status 1 if
one is off by more than one unit of its last printed digit (papers round, and sometimes truncate: -96.87 for -96.875).

Not recomputed: figures of dynamic rank selection (X-EcoMLA Table 7 and the `Dynamic` rows), whose ranks depend on the
weights and are not printed, and X-EcoMLA's cache sizes of 42.91 % and 25.00 % for Llama-3.2-3B in Table 8, printed
without a rank.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from optimum_mla.core.geometry import MLAGeometry, ModelGeometry

SOURCE_BITS = 16  # bits per cached number without quantization


@dataclass(frozen=True)
class SourceModel:
    """A published model as its `config.json` describes it; all layers have the same shape, and the MLP is gated."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    tied_embeddings: bool
    query_key_value_bias: bool = False

    @property
    def attention(self) -> MLAGeometry:
        """Shape of one attention layer before conversion."""
        return MLAGeometry(
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            query_bias=self.query_key_value_bias,
            key_value_bias=self.query_key_value_bias,
        )

    @property
    def source(self) -> ModelGeometry:
        """Shapes of all attention layers before conversion."""
        return self.converted(self.attention)

    def converted(self, layer: MLAGeometry, converted_layers: Sequence[int] | None = None) -> ModelGeometry:
        """Return the shapes of all attention layers after `converted_layers` (from 0; None: all) became `layer`."""
        chosen = range(self.layers) if converted_layers is None else converted_layers
        return ModelGeometry(tuple(layer if index in chosen else self.attention for index in range(self.layers)))

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model before conversion."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        return embeddings + self.layers * (self.attention.parameters + mlp + norms) + self.hidden_size


SMOLLM_135M = SourceModel("SmolLM-135M", 49152, 576, 1536, 30, 9, 3, 64, tied_embeddings=True)
SMOLLM_360M = SourceModel("SmolLM-360M", 49152, 960, 2560, 32, 15, 5, 64, tied_embeddings=True)
SMOLLM_1B7 = SourceModel("SmolLM-1.7B", 49152, 2048, 8192, 24, 32, 32, 64, tied_embeddings=True)
LLAMA2_7B = SourceModel("Llama-2-7B", 32000, 4096, 11008, 32, 32, 32, 128, tied_embeddings=False)
LLAMA32_1B = SourceModel("Llama-3.2-1B", 128256, 2048, 8192, 16, 32, 8, 64, tied_embeddings=True)
LLAMA32_3B = SourceModel("Llama-3.2-3B", 128256, 3072, 8192, 28, 24, 8, 128, tied_embeddings=True)
LLAMA3_8B = SourceModel("Llama-3-8B", 128256, 4096, 14336, 32, 32, 8, 128, tied_embeddings=False)
LLAMA31_8B = replace(LLAMA3_8B, name="Llama-3.1-8B")
QWEN25_7B = SourceModel("Qwen2.5-7B", 152064, 3584, 18944, 28, 28, 4, 128, False, query_key_value_bias=True)
QWEN25_14B = SourceModel("Qwen2.5-14B", 152064, 5120, 13824, 48, 40, 8, 128, False, query_key_value_bias=True)


@dataclass(frozen=True)
class Figure:
    """One printed figure, and the shapes that it is computed from.

    `printed` is a string because its number of decimals sets the tolerance. `bits` is the width of a cached number.
    `remark` explains a setting that differs from the one printed beside the figure, which gives another figure.
    """

    paper: str
    table: str
    model: SourceModel
    setting: str
    quantity: str
    printed: str
    geometry: ModelGeometry
    bits: float = SOURCE_BITS
    remark: str = ""

    @property
    def computed(self) -> float:
        """The computed figure in the unit of its quantity at full precision."""
        return QUANTITIES[self.quantity](self)

    @property
    def agrees(self) -> bool:
        """Whether the printed figure is off by no more than one unit of its last digit."""
        last_digit = Decimal(1).scaleb(-len(self.printed.partition(".")[2]))
        return abs(Decimal(self.computed) - Decimal(self.printed)) <= last_digit

    @property
    def verdict(self) -> str:
        """The word `yes` if the figure agrees, otherwise `no`."""
        return "yes" if self.agrees else "no"


def _cache_fraction(figure: Figure) -> float:
    return figure.geometry.cache_bytes(bits=figure.bits) / figure.model.source.cache_bytes(bits=SOURCE_BITS)


def _parameters(figure: Figure) -> int:
    return figure.model.parameters + figure.geometry.parameters_added


CACHE_CHANGE, CACHE_SIZE, CACHE_REDUCTION = "cache, change in %", "cache, % of source", "cache, times smaller"
CACHED_NUMBERS, PARAMETERS = "numbers cached per layer", "parameters, 10^9"

QUANTITIES: dict[str, Callable[[Figure], float]] = {
    CACHE_CHANGE: lambda figure: 100 * (_cache_fraction(figure) - 1),
    CACHE_SIZE: lambda figure: 100 * _cache_fraction(figure),
    CACHE_REDUCTION: lambda figure: 1 / _cache_fraction(figure),
    CACHED_NUMBERS: lambda figure: figure.geometry.cache_numbers / figure.model.layers,
    PARAMETERS: lambda figure: _parameters(figure) / 1e9,
}

MHA2MLA, X_ECOMLA, TRANSMLA = "MHA2MLA", "X-EcoMLA", "TransMLA"


def mha2mla_layer(model: SourceModel, d_kv: int) -> MLAGeometry:
    """Return a layer of MHA2MLA with RoPE on 1/8 of each key head and a joint latent of `d_kv` dims per key head."""
    rope = model.head_dim // 8
    return replace(
        model.attention,
        attention_form="decoupled",
        kv_lora_rank=d_kv * model.key_value_heads,
        qk_nope_head_dim=model.head_dim - rope,
        qk_rope_head_dim=rope,
        num_rope_heads=model.key_value_heads,
        v_head_dim=model.head_dim,
        num_up_heads=model.key_value_heads,
    )


def x_ecomla_layer(model: SourceModel, rank: int, rope: int, query_rank: int | None = None) -> MLAGeometry:
    """Return a layer of X-EcoMLA with one rotary key of `rope` dims for all heads and as many key dims without RoPE.

    The paper's `d_qk` is the number of key dims without RoPE; it always sets `d_qk = d_r`, so `rope` is both.
    """
    return replace(
        model.attention,
        attention_form="decoupled",
        kv_lora_rank=rank,
        q_lora_rank=query_rank,
        qk_nope_head_dim=rope,
        qk_rope_head_dim=rope,
        num_rope_heads=1,
        v_head_dim=model.head_dim,
        num_up_heads=model.heads,
    )


def transmla_layer(model: SourceModel) -> MLAGeometry:
    """Return a layer of TransMLA with latents as wide as the source's keys and values, and one key per query head."""
    rank = model.key_value_heads * model.head_dim
    return replace(model.attention, attention_form="full", k_lora_rank=rank, v_lora_rank=rank, num_up_heads=model.heads)


def mha2mla_figures() -> list[Figure]:
    """Return the cache sizes of Tables 1 and 2 and of Figure 5 of MHA2MLA."""
    table_1 = {SMOLLM_135M: (32, 16, 8), SMOLLM_360M: (32, 16, 8), SMOLLM_1B7: (32, 16, 8), LLAMA2_7B: (64, 32, 16)}
    table_2 = (
        (None, 16, CACHE_SIZE, "100.0"),
        (None, 4, CACHE_CHANGE, "-75.00"),
        (None, 2, CACHE_CHANGE, "-87.50"),
        (64, 16, CACHE_CHANGE, "-68.75"),
        (64, 4, CACHE_CHANGE, "-92.19"),
        (32, 16, CACHE_CHANGE, "-81.25"),
        (32, 4, CACHE_CHANGE, "-95.31"),
        (16, 16, CACHE_CHANGE, "-87.50"),
        (16, 4, CACHE_CHANGE, "-96.87"),
    )
    rows = []
    for model, ranks in table_1.items():
        for d_kv, printed in zip(ranks, ("-68.75", "-81.25", "-87.50"), strict=True):
            geometry = model.converted(mha2mla_layer(model, d_kv))
            rows.append(Figure(MHA2MLA, "Table 1", model, f"d_kv {d_kv}", CACHE_CHANGE, printed, geometry))
    for rank, bits, quantity, printed in table_2:
        geometry = LLAMA2_7B.converted(mha2mla_layer(LLAMA2_7B, rank)) if rank else LLAMA2_7B.source
        setting = f"d_kv {rank}" if rank else "source"
        if bits != SOURCE_BITS:
            setting += f", Int{bits}"
        rows.append(Figure(MHA2MLA, "Table 2", LLAMA2_7B, setting, quantity, printed, geometry, bits))
    for model in (SMOLLM_135M, LLAMA2_7B):
        for d_kv, printed in zip(table_1[model], ("31.25", "18.75", "12.5"), strict=True):
            geometry = model.converted(mha2mla_layer(model, d_kv))
            rows.append(Figure(MHA2MLA, "Fig. 5", model, f"d_kv {d_kv}", CACHE_SIZE, printed, geometry))
    return rows


def x_ecomla_figures() -> list[Figure]:
    """Return the cache sizes and parameter counts of X-EcoMLA at fixed ranks, with the table numbers of v4.

    The rotary key has 32 dims for models of head dim 64, as the text says, except where Table 6 says 64. For head dim
    128 (Llama-3.2-3B and 8B) the released configurations have 64, and only 64 yields the printed sizes. Table 2 and
    section A.4.3 print r_q 854 where Tables 6 and 11 print 864; both make 1.23 10^9 parameters.
    """
    rows: list[Figure] = []

    def add(
        table: str,
        model: SourceModel,
        rank: int,
        rope: int,
        *printed: tuple[str, str],
        query_rank: int | None = None,
        converted_layers: Sequence[int] | None = None,
        remark: str = "",
    ) -> None:
        geometry = model.converted(x_ecomla_layer(model, rank, rope, query_rank), converted_layers)
        setting = f"r {rank}, R {rope}" + (f", r_q {query_rank}" if query_rank else "")
        if converted_layers is not None:
            setting += f", {len(converted_layers)} of {model.layers} layers"
        for quantity, value in printed:
            rows.append(Figure(X_ECOMLA, table, model, setting, quantity, value, geometry, remark=remark))

    for rank, printed in ((512, "1.9"), (256, "3.6"), (128, "6.4"), (64, "10.6"), (48, "12.8")):
        add("Fig. 1", LLAMA32_1B, rank, 32, (CACHE_REDUCTION, printed))

    add("Table 1", SMOLLM_135M, 160, 32, (CACHE_SIZE, "50"))
    add("Table 1", SMOLLM_360M, 288, 32, (CACHE_SIZE, "50"))
    add("Table 1", LLAMA32_1B, 512, 32, (CACHE_SIZE, "53.1"))
    add("Table 1", LLAMA32_3B, 816, 64, (CACHE_SIZE, "43"))

    rows.append(Figure(X_ECOMLA, "Table 2", LLAMA32_1B, "source", PARAMETERS, "1.24", LLAMA32_1B.source))
    for rank, query_rank, size in (
        (512, 864, "53.1"),
        (256, 1184, "28.1"),
        (128, 1344, "15.6"),
        (64, 1424, "9.4"),
        (48, 1440, "7.81"),
    ):
        add("Table 2", LLAMA32_1B, rank, 32, (CACHE_SIZE, size), (PARAMETERS, "1.23"), query_rank=query_rank)

    add("Table 3", LLAMA3_8B, 256, 64, (CACHE_SIZE, "15.63"))
    add("Table 3", LLAMA31_8B, 160, 64, (CACHE_SIZE, "10.94"))
    add("Sec. 5.2", LLAMA31_8B, 128, 64, (CACHE_REDUCTION, "10.67"))
    add("Table 4", SMOLLM_1B7, 480, 32, (CACHE_SIZE, "12.5"))
    add("Table 4", SMOLLM_1B7, 2016, 32, (CACHE_SIZE, "50"))
    baseline = SMOLLM_1B7.converted(mha2mla_layer(SMOLLM_1B7, 8))
    rows.append(Figure(X_ECOMLA, "Table 4", SMOLLM_1B7, "MHA2MLA, d_kv 8", CACHE_SIZE, "12.5", baseline))
    add("Table 5", LLAMA3_8B, 256, 64, (CACHE_SIZE, "15.63"))

    for rank, rope, query_rank, size in (
        (512, 32, 864, "53.1"),
        (512, 64, 480, "56.3"),
        (256, 32, 1184, "28.1"),
        (256, 64, 736, "31.3"),
        (128, 32, 1344, "15.6"),
        (128, 64, 864, "18.8"),
    ):
        add("Table 6", LLAMA32_1B, rank, rope, (CACHE_SIZE, size), (PARAMETERS, "1.23"), query_rank=query_rank)

    add("Table 8", LLAMA32_1B, 512, 32, (CACHE_SIZE, "53.13"))
    add("Table 8", LLAMA32_1B, 256, 32, (CACHE_SIZE, "28.13"))

    smallest = "printed for R 32, which gives 7.81 % (as Table 2 prints); 6.25 % takes R 16"
    add("Table 9", LLAMA32_1B, 128, 32, (CACHE_SIZE, "15.6"))
    add("Table 9", LLAMA32_1B, 64, 32, (CACHE_SIZE, "9.4"))
    add("Table 9", LLAMA32_1B, 48, 16, (CACHE_SIZE, "6.25"), remark=smallest)

    half = "printed for R 32, which gives 76.6 %; 78.1 % takes R 64"
    hybrid_layers = (1, 3, 5, 7, 8, 10, 12, 14)
    add("Table 10", LLAMA32_1B, 512, 32, (CACHE_SIZE, "53.1"))
    add(
        "Table 10",
        LLAMA32_1B,
        512,
        64,
        (CACHE_SIZE, "78.1"),
        converted_layers=hybrid_layers,
        remark=half,
    )

    for rank, query_rank, size in ((512, 864, "53.1"), (256, 1184, "28.1"), (128, 1344, "15.6"), (64, 1424, "9.4")):
        add("Table 11", LLAMA32_1B, rank, 32, (CACHE_SIZE, size), (PARAMETERS, "1.23"), query_rank=query_rank)
    add("Table 11", LLAMA32_1B, 48, 16, (CACHE_SIZE, "6.25"), query_rank=1440, remark=smallest)
    add("Table 11", LLAMA32_1B, 48, 32, (PARAMETERS, "1.23"), query_rank=1440)
    return rows


def transmla_figures() -> list[Figure]:
    """Return the model sizes before and after TransMLA, and the change of the cache.

    The paper says in words that the size of the cache does not change, which is the change of 0 here.
    """
    rows = []
    for model, size in ((QWEN25_7B, "7.6"), (QWEN25_14B, "14.7")):
        converted = model.converted(transmla_layer(model))
        setting = f"r_k = r_v = {model.key_value_heads * model.head_dim}"
        rows.append(Figure(TRANSMLA, "text", model, "source", PARAMETERS, size, model.source))
        rows.append(Figure(TRANSMLA, "text", model, setting, CACHE_CHANGE, "0", converted))
    converted = QWEN25_7B.converted(transmla_layer(QWEN25_7B))
    rows.append(Figure(TRANSMLA, "text", QWEN25_7B, "r_k = r_v = 512", CACHED_NUMBERS, "1024", converted))
    rows.append(Figure(TRANSMLA, "text", QWEN25_7B, "r_k = r_v = 512", PARAMETERS, "7.7", converted))
    return rows


def all_figures() -> list[Figure]:
    """Return every figure of the three papers in the order of the papers and their tables."""
    return [*mha2mla_figures(), *x_ecomla_figures(), *transmla_figures()]


def disagreements(figures: Sequence[Figure]) -> list[str]:
    """Return one line for each figure that does not agree."""
    return [
        f"{figure.paper} {figure.table}, {figure.model.name}, {figure.setting}: {figure.quantity} is printed as "
        f"{figure.printed} and computed as {figure.computed:.6g}"
        for figure in figures
        if figure.verdict == "no"
    ]


def format_table(figures: Sequence[Figure]) -> str:
    """Return the figures as an aligned text table, with the remarks below it."""
    header = ("paper", "table", "model", "setting", "quantity", "printed", "computed", "ok")
    rows = [
        (f.paper, f.table, f.model.name, f.setting, f.quantity, f.printed, f"{f.computed:.4f}", f.verdict)
        for f in figures
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    numeric = {header.index("printed"), header.index("computed")}
    lines = [
        "  ".join(
            cell.rjust(widths[column]) if column in numeric else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ).rstrip()
        for row in (header, *rows)
    ]
    notes = [f"remark: {f.paper} {f.table}, printed {f.printed}: {f.remark}" for f in figures if f.remark]
    return "\n".join([*lines, *notes])


def as_records(figures: Sequence[Figure]) -> list[dict[str, str | float]]:
    """Return the figures as JSON objects, with `printed` as a string because of its number of decimals."""
    return [
        {
            "paper": figure.paper,
            "table": figure.table,
            "model": figure.model.name,
            "setting": figure.setting,
            "quantity": figure.quantity,
            "printed": figure.printed,
            "computed": figure.computed,
            "ok": figure.verdict,
            "remark": figure.remark,
        }
        for figure in figures
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "paper_tables.json")
    return parser.parse_args()


def main() -> int:
    """Print the table, write the JSON file, and return the exit status."""
    arguments = parse_arguments()
    figures = all_figures()
    print(format_table(figures))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(as_records(figures), indent=1) + "\n", encoding="utf-8")
    failed = disagreements(figures)
    verdicts = [figure.verdict for figure in figures]
    print(f"{verdicts.count('yes')} of {len(figures)} figures agree")
    for line in failed:
        print(f"disagrees: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
