"""What the stages of one call are expected to take, so that its bar can tell the time left.

Counted in forwards of one token through the linears. Work on weights alone grows with them as a
forward does, so that it is worth a number of tokens, too. Measured on SmolLM2-135M with one thread
of a Zen 5 core (benchmarks/cpu/quantize_time.py); on other machines the proportions differ a bit.
"""

from arc_ao.calibration.fisher import FISHER_TOKENS
from arc_ao.config import ARCConfig
from arc_ao.methods.recipe import SEARCH_TOKENS, expected_runs
from arc_ao.methods.tuning.session import NORM_TOKENS

OBSERVE = 0.5  # of a token, on top of its forward, for each kind of blocks
DIFFERENTIATE = 3.4  # a token forward, again and backward
WEIGH = 2.0  # the squares of its inputs and errors, on top
ANALYSE = 300.0  # search of all weights' block scales
QUANTIZE = 380.0  # all weights under known scales
RUN = 1.15  # a token through a model that is quantized on the fly
GATHER = 4.5  # a token through every block for each of its Hessians
ROUND = 30_000.0  # factors of all Hessians and error feedback
CONVERT = 800.0
TUNE = 5.0  # a token through the quantized model, again and backward
SECOND = 400.0  # of training, until the bar knows how fast this machine and model are


def expected_costs(configs: list[ARCConfig], tokens: int, batches: int) -> dict[str, float]:
    """Cost of every stage of a call, by its name; the largest where configs differ.

    Args:
        tokens, batches: of the calibration data.
    """
    costs: dict[str, float] = {}
    for config in configs:
        for stage, cost in _of_config(config, tokens, batches).items():
            costs[stage] = max(cost, costs.get(stage, 0.0))
    return costs


def _of_config(config: ARCConfig, tokens: int, batches: int) -> dict[str, float]:
    searched, length = config.searched, tokens / max(1, batches)
    orders = 3 if "channel_order" in searched else 1
    costs = {"convert": CONVERT}
    if tokens:
        costs["calibrate"] = tokens * (1 + OBSERVE * orders)
    if config.tunes_codes:
        costs["reference"] = tokens
        costs["tune"] = SECOND * 60 * config.tuning_minutes
    elif config.resolve().tuning == "norms":
        costs["reference"] = min(tokens, NORM_TOKENS)
        costs["tune"] = TUNE * min(tokens, NORM_TOKENS)
    if config.weighs_layers or config.kronecker:
        weighed = min(tokens, FISHER_TOKENS)
        run = tokens if config.kronecker else weighed
        costs["weigh layers"] = DIFFERENTIATE * run + WEIGH * weighed
    if searched:
        count = max(1, min(batches, int(SEARCH_TOKENS // max(1, length))))
        runs = expected_runs(config, count)
        costs["try recipes"] = ANALYSE * orders + runs * (RUN * length + QUANTIZE)
    else:
        costs["analyse weights"] = ANALYSE
    if config.needs_hessian:
        costs["round weights"] = GATHER * tokens + ROUND
    return costs
