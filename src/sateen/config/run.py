"""The settings of a whole run: what a recipe says after defaults, overlays and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sateen.config.base import Config, Count, problem
from sateen.config.data import AnySource, ModelSource, TokenizerConfig
from sateen.config.stages import AnyStage, MOPDConfig, StageConfig
from sateen.errors import unknown_name


class RunConfig(Config):
    """A run. Relative paths in it are relative to the current directory.

    Attributes:
        name: name of the run and of its folder under `runs/`.
        seed: of initialisation, data order and sampling.
        threads: CPU threads of torch; 0 leaves torch's own choice.
        dtype: of the computation; parameters and optimizer state stay float32.
        device: `cpu`, `cuda`, `cuda:N` or `mps`.
        model: where the model's shape comes from.
        tokenizer: where the tokenizer comes from.
        data: source name -> source.
        stages: what is done, in order.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Count = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d+)?)$")] = "cpu"
    model: ModelSource
    tokenizer: TokenizerConfig
    data: dict[str, AnySource]
    stages: Annotated[tuple[AnyStage, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _sources_exist(self) -> RunConfig:
        for index, stage in enumerate(self.stages):
            for source in stage.sources:
                if source not in self.data:
                    message = f"names no source: {unknown_name('data source', source, self.data)}"
                    raise problem(message, "stages", index, "sources", source)
            earlier = [other.name for other in self.stages[:index] if other.name]
            if stage.name in earlier:
                raise problem(f"= {stage.name!r} is the name of an earlier stage", "stages", index, "name")
            if stage.start_from is not None and stage.start_from not in earlier:
                message = f"names no earlier stage: {unknown_name('stage', stage.start_from, earlier)}"
                raise problem(message, "stages", index, "start_from")
            if not any(self.source_weights(stage).values()):
                raise problem("has no source with a weight above 0", "stages", index)
            if isinstance(stage, MOPDConfig):
                self._check_teachers(stage, index, earlier)
        return self

    def _check_teachers(self, stage: MOPDConfig, index: int, earlier: list[str]) -> None:
        """Every source has one teacher; a single word names an earlier stage, or is a path that exists."""
        domains = [name for name, weight in self.source_weights(stage).items() if weight]
        for domain, teacher in stage.teachers.items():
            place = ("stages", index, "teachers", domain)
            if domain not in domains:
                raise problem(f"has no such source: {unknown_name('source', domain, domains)}", *place)
            if len(teacher.parts) == 1 and str(teacher) not in earlier and not teacher.exists():
                known = unknown_name("stage", str(teacher), earlier)
                raise problem(f"is neither an earlier stage nor a path that exists: {known}", *place)
        missing = [domain for domain in domains if domain not in stage.teachers]
        if missing:
            message = f"has none for {', '.join(missing)}; every source of the stage needs one"
            raise problem(message, "stages", index, "teachers")

    def source_weights(self, stage: StageConfig) -> dict[str, float]:
        """Source name -> weight in a stage: the stage's own, or each source's where it gives none."""
        return dict(stage.sources) or {name: source.weight for name, source in self.data.items()}
