"""quantize_: one call, or torchao's three steps, from a model to ARCTensor weights.

one call            collect targets -> prepare -> calibrate -> measure the recipe -> convert,
                    where weights need Hessians block by block (flow/sequential.py)
step="prepare"      an observer on every linear
(run the model)     statistics, shared inputs
step="convert"      one plan for all linears of the config, then one weight after the other;
                    Hessians are those of the unquantized model's inputs (methods/hessian.py)
step="prepare_for_loading"   an empty ARCTensor of the shape that a checkpoint has
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_ as torchao_quantize_
from torchao.quantization import register_quantize_module_handler

from arc_ao.calibration.data import Batch, num_tokens, observe, to_batches
from arc_ao.calibration.fingerprint import fingerprint
from arc_ao.calibration.session import CalibrationSession, Member, detach, observer_on
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.config import ARCConfig
from arc_ao.config_family import CONFIGS
from arc_ao.flow.convert_blocks import convert_blocks
from arc_ao.flow.expected_cost import expected_costs
from arc_ao.flow.planning import (
    measure_session,
    plan_session,
    plan_unsearched,
    refuse_one_call,
    unreached,
)
from arc_ao.flow.targets import FilterFn, Targets, check_linear, collect_targets, unsuited
from arc_ao.flow.trial_run import check_runs, try_out
from arc_ao.loading import empty_tensor
from arc_ao.memory import release_memory
from arc_ao.methods.measured import load_sessions, save_sessions
from arc_ao.methods.plan import weight_amax
from arc_ao.methods.recipe import Trial
from arc_ao.methods.tuning.session import tuning_session
from arc_ao.methods.weights import quantize_weight
from arc_ao.pretrained import is_pretrained_model
from arc_ao.progress import Progress
from arc_ao.quantized_linear import set_weight
from arc_ao.summary import QuantizationSummary, model_bytes, summarize

NAME = "_arc_name"  # fully qualified name, on a linear while quantize_ runs


def quantize_(
    model: nn.Module,
    config: AOBaseConfig | None = None,
    *,
    calibration_data: Iterable[Any] | None = None,
    tokenizer: Any = None,
    max_length: int = 512,
    filter_fn: FilterFn | None = None,
    progress: bool = True,
    work_dir: str | Path | None = None,
) -> QuantizationSummary | None:
    """Quantize the linears of `model` in place.

    Args:
        model: any module; output heads, embeddings, routers and norms are left alone, and so are,
            with one warning, linears that are more than F.linear of a weight of their own, and
            those that no calibration token reaches.
        config: ARCConfig (default `ARCConfig()`), or torchao's FqnToConfig of them per layer.
        calibration_data: iterable of input-id tensors, keyword dicts of tensors or lists, or, with
            `tokenizer`, strings and rows with "text" or "messages". Padding that attention masks
            say is left out. Not needed where nothing is measured (`budget=0`, `recipe="plain"`).
        max_length: strings are cut after this many tokens.
        filter_fn: (module, fqn) -> whether to quantize, instead of the default choice.
        progress: show progress bars.
        work_dir: folder that keeps the calibration and every finished block; the same call on the
            same folder goes on where an interrupted one stopped and gives the same bits.

    Returns:
        What was done (None for a single step). A refused call leaves the model as it was:
        everything is checked before the first weight changes, and weights are then converted one
        by one.

    Raises:
        ValueError: a layer that cannot be quantized, missing calibration data, or a `work_dir` of
            another call, or in use by another process. RuntimeError: the quantized model does not
            run on its shortest batch; its weights are gone by then.
    """
    config = ARCConfig() if config is None else config
    if not isinstance(config, AOBaseConfig):
        raise TypeError(f"config: expected an ARCConfig or FqnToConfig, got {config!r}")
    targets = collect_targets(model, config, filter_fn)
    groups = targets.by_config()
    if any(getattr(layer_config, "step", None) for layer_config, _ in groups):
        if work_dir is not None:
            raise ValueError("work_dir: expected None for one of torchao's steps; use the one call")
        _run_step(model, groups, progress)
        return None
    _require_data(groups, calibration_data)
    for name, module in targets.modules.items():
        _refuse_prepared(name, module)
        weight_amax(Member(name, module))  # refuses NaN and Inf
    before = model_bytes(model)
    batches = None
    if calibration_data is not None:
        batches = to_batches(calibration_data, tokenizer, max_length)
    example = try_out(model, targets, batches)
    groups = targets.by_config()
    arc_groups = [(c, modules) for c, modules in groups if isinstance(c, ARCConfig)]
    tuning = tuning_session(model, arc_groups, batches)
    stages = _stages([c for c, _ in arc_groups], batches or [], progress)
    with closing(stages), _work_folder(work_dir, model, targets.configs, batches) as work:
        with _unchanged_on_error(model):
            resolved = _calibrate_and_resolve(model, arc_groups, targets, batches, work, stages)
            if tuning is not None:
                tuning.record(model, set(targets.modules.values()), stages)
            for layer_config, modules in groups:
                if id(layer_config) not in resolved:
                    _apply(model, layer_config, modules)  # another library's config
        sessions = [session for *_, session in resolved.values()]
        notes = {}
        if any(final.needs_hessian for final, *_ in resolved.values()):
            notes = convert_blocks(model, sessions, batches, set_weight, work=work, progress=stages)
        _convert_groups([(resolved[id(c)][0], modules) for c, modules in arc_groups], stages)
        tuned = None if tuning is None else tuning.run(model, work, stages)
    check_runs(model, example)
    _let_save(model)
    choices = {name: found for session in sessions for name, found in session.choices.items()}
    tried = [(final, trials) for final, trials, _ in resolved.values()]
    return summarize(model, tried, targets.skipped, before, choices, notes, stages.seconds, tuned)


def _work_folder(
    path: str | Path | None,
    model: nn.Module,
    configs: dict[str, AOBaseConfig],
    batches: list[Batch | Tensor] | None,
) -> AbstractContextManager[WorkDir | None]:
    if path is None:
        return nullcontext()
    return WorkDir(path, fingerprint(model, configs, batches or []))


def _stages(configs: list[ARCConfig], batches: list[Batch | Tensor], show: bool) -> Progress:
    """The bar of one call."""
    tokens = sum(num_tokens(batch) for batch in batches)
    return Progress(expected_costs(configs, tokens, len(batches)), show=show)


def _calibrate_and_resolve(
    model: nn.Module,
    groups: list[tuple[ARCConfig, dict[str, nn.Linear]]],
    targets: Targets,
    batches: list[Batch | Tensor] | None,
    work: WorkDir | None,
    progress: Progress,
) -> dict[int, tuple[ARCConfig, list[Trial], CalibrationSession]]:
    """Prepare, calibrate, measure; id of each config -> its convert config, trials and session.

    Linears that no token reached leave the targets.
    """
    for config, modules in groups:
        prepare = config.with_step("prepare")
        prepare.__dict__["_session"] = CalibrationSession(prepare, sums_products=False)
        _apply(model, prepare, modules)
    sessions = [observer_on(next(iter(modules.values()))).session for _, modules in groups]
    if any(session.config.sample_tokens for session in sessions):
        work = None  # rows of the inputs are not kept there: they are gathered anew
    measured = None if work is None else load_sessions(work, sessions)
    if batches is not None and measured is None:
        for session in sessions:
            session.spread_samples(sum(num_tokens(batch) for batch in batches))
        observe(model, batches, progress)
    left = unreached((session, session.config) for session in sessions)
    targets.leave(left)
    for session in sessions:
        session.leave(left.keys())
        session.observing = False  # a search for one config must not feed the others
    if measured is None:
        measured = [measure_session(model, s, batches, progress=progress) for s in sessions]
        if work is not None:
            save_sessions(work, sessions, measured)
    resolved = {}
    for (config, _), session, trials in zip(groups, sessions, measured, strict=True):
        final = (trials[0].config if trials else config.resolve()).with_step("convert")
        plan_session(session, final, progress=progress)
        resolved[id(config)] = (final, trials, session)
    return resolved


def _run_step(
    model: nn.Module, groups: list[tuple[AOBaseConfig, dict[str, nn.Linear]]], progress: bool
) -> None:
    """One of torchao's steps. Conversions come last, when nothing can be refused any more."""
    converting = lambda config: isinstance(config, ARCConfig) and config.step == "convert"
    converts = [group for group in groups if converting(group[0])]
    with _unchanged_on_error(model):
        _plan_prepared(converts)
        for config, modules in groups:
            if isinstance(config, ARCConfig) and config.step == "prepare":
                refuse_one_call(config)
                config.__dict__.pop("_session", None)  # every "prepare" starts its own session
            if not converting(config):
                _apply(model, config, modules)
            if session := config.__dict__.get("_session"):
                session.watch(model)
    if converts:
        stages = Progress({"convert": 1.0}, show=progress)
        _convert_groups(converts, stages)
        stages.close()
        _let_save(model)


def _let_save(model: nn.Module) -> None:
    """A quantized transformers model saves itself; other modules are left alone."""
    if is_pretrained_model(model):
        from arc_ao.integrations.quantizer import attach_quantizer

        attach_quantizer(model)


def _plan_prepared(groups: list[tuple[ARCConfig, dict[str, nn.Linear]]]) -> None:
    """Plan every session that these linears belong to."""
    sessions: dict[int, tuple[CalibrationSession, ARCConfig]] = {}
    for config, modules in groups:
        observers = [o for o in map(observer_on, modules.values()) if o is not None]
        if not observers:
            raise ValueError(
                f"{next(iter(modules))}: expected a prepared linear, found one without an "
                "observer; call quantize_ with step='prepare' and run calibration data first"
            )
        sessions |= {id(o.session): (o.session, config) for o in observers}
    plan_unsearched(sessions.values())


def _convert_groups(
    groups: list[tuple[ARCConfig, dict[str, nn.Linear]]], progress: Progress
) -> None:
    """Convert planned linears one by one, each original freed before the next is touched.

    Nothing is kept to go back to, since that would cost the memory of the whole model; an interrupt
    leaves the linears it did not reach unquantized and without observers.
    """
    try:
        work = [(config, *item) for config, modules in groups for item in modules.items()]
        for config, name, module in progress.steps("convert", work):
            _apply(module, config, {name: module})
    finally:
        for _, modules in groups:
            for module in modules.values():
                detach(module)


def _apply(model: nn.Module, config: AOBaseConfig, modules: dict[str, nn.Linear]) -> None:
    """torchao's quantize_ on exactly these modules, with their names at hand."""
    chosen = {id(module) for module in modules.values()}
    for name, module in modules.items():
        setattr(module, NAME, name)
    try:
        torchao_quantize_(model, config, filter_fn=lambda m, _: id(m) in chosen)
    finally:
        for module in modules.values():
            if hasattr(module, NAME):
                delattr(module, NAME)


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put every module back as it was if the body raises; parameters are kept by reference."""
    machinery = {key for key, value in vars(nn.Module()).items() if isinstance(value, dict)}
    before = [
        (
            module,
            dict(vars(module)),
            {k: dict(vars(module)[k]) for k in machinery & vars(module).keys()},
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for key, content in contents.items():
                vars(module)[key].clear()  # the same dictionary: hook handles refer to it
                vars(module)[key].update(content)
        raise


def _arc_transform(
    module: nn.Module, config: ARCConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    """torchao's handler: one step on one linear."""
    if parameter_name != "weight":
        raise ValueError(f"ARCConfig quantizes the parameter 'weight', got {parameter_name!r}")
    reason = unsuited(module, config)
    if reason and config.step == "convert":
        return module  # "prepare" has said so
    if reason:
        name = _name_of(module)
        warnings.warn(f"{name} stays unquantized because {reason}", stacklevel=2)
    elif config.step == "prepare":
        _prepare(module, config)
    elif config.step == "convert":
        _convert(module, config)
    elif config.step == "prepare_for_loading":
        set_weight(module, empty_tensor(module, config))
    else:
        _quantize_uncalibrated(module, config)
    return module


for _config in CONFIGS:
    register_quantize_module_handler(_config)(_arc_transform)


def _name_of(module: nn.Module) -> str:
    shape = f"Linear({module.in_features}, {module.out_features})"
    return getattr(module, NAME, None) or shape


def _prepare(module: nn.Linear, config: ARCConfig) -> None:
    check_linear(_name_of(module), module)
    session = config.__dict__.get("_session")
    observer = observer_on(module)
    if observer is not None and observer.session is session:
        return  # a module of two parents is visited twice
    _refuse_prepared(_name_of(module), module)
    if session is None:
        session = CalibrationSession(config)
        config.__dict__["_session"] = session
    session.attach(_name_of(module), module)


def _refuse_prepared(name: str, module: nn.Linear) -> None:
    if observer_on(module) is not None:
        raise ValueError(
            f"{name}: expected a linear without an observer, found a prepared one; convert it "
            "before preparing again"
        )


def _convert(module: nn.Linear, config: ARCConfig) -> None:
    observer = observer_on(module)
    if observer is None:
        return  # not prepared, so not a target
    session = observer.session
    if session.plans is None or observer.name not in session.plans:
        plan_unsearched([(session, config)])
    if observer.name not in session.plans:
        return  # no token reached it
    name, weight = observer.name, module.weight.detach()
    plan, rounding = session.plans.pop(name), session.roundings.pop(name, None)
    tensor = rounding.quantize(name, weight, plan) if rounding else quantize_weight(weight, plan)
    detach(module)
    set_weight(module, tensor.packed())
    release_memory()


def _quantize_uncalibrated(module: nn.Linear, config: ARCConfig) -> None:
    check_linear(_name_of(module), module)
    if config.needs_calibration:
        raise ValueError(
            f"{_name_of(module)}: expected calibration for residual channels, found none; call "
            "arc_ao.quantize_(model, config, calibration_data=...), go through step='prepare' and "
            "step='convert', or use ARCConfig(budget=0.0, recipe='plain')"
        )
    session = CalibrationSession(config)
    session.attach(_name_of(module), module)
    _convert(module, config)


def _require_data(groups: list[tuple[AOBaseConfig, Any]], data: Iterable[Any] | None) -> None:
    configs = [config for config, _ in groups if isinstance(config, ARCConfig)]
    if data is None and any(config.needs_calibration for config in configs):
        raise ValueError(
            "expected calibration_data for residual channels, channel scales or a low-rank branch, "
            "or with exportable=True, found None; pass batches of input ids (a few thousand "
            "tokens of typical text), or use NVFP4Config() for plain NVFP4"
        )
