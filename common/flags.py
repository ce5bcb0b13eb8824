"""Flags: a dataclass becomes a command line, and every value is checked before a run begins."""
import argparse
import inspect
import json
import math
import os
import re
from dataclasses import fields

from common.distributed import world_size
from common.hf import is_hf_folder
from common.tokenizer import InputError

# limits of a numeric flag: 0 to infinity, but for these
AT_LEAST = {"steps": 1, "prompts": 1, "epochs": 1, "batch": 1, "minibatch": 1, "max_new_tokens": 1,
            "eval_every": 1, "group_size": 2, "responses": 2, "block_size": 2,
            "n_layer": 1, "n_embd": 1, "n_head": 1, "truncated_reward": -math.inf,
            "length_bias": -math.inf}
AT_MOST = {"gamma": 1, "gae_lambda": 1, "label_noise": 1, "ref_mix": 1, "seed": 2 ** 32 - 1}
ABOVE_ZERO = {"temperature": "or all responses to a prompt are the same",
              "lora_alpha": "or adapters have no effect"}
BELOW_HALF = {"label_smoothing": "or the labels say nothing or the opposite"}


def parse_config(Config, argv=None):
    """`--field value` for every field of a dataclass; the comment beside the field is its help, and
    comments of their own, such as "# rollout", are headings. A bool may stand alone: --resume. With
    --resume the settings of the run in --out are the defaults. Fields that a subclass adds have
    their help in their metadata (experiments/variants.py)."""
    source = inspect.getsource(Config)
    module = inspect.getmodule(Config)
    help_of = dict(re.findall(r"^    (\w+):.*?#\s*(.+)$", source, re.M))

    def true_or_false(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
        return text.lower() == "true"

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message} (--help lists all flags)")

    class Formatter(argparse.HelpFormatter):
        def __init__(self, prog):
            super().__init__(prog, max_help_position=31, width=110)

    title = " ".join(module.__doc__.strip().split("\n\n")[:2]).replace("\n", " ")
    parser = Parser(formatter_class=Formatter, allow_abbrev=False, description=title,
                    usage="%(prog)s [--flag value ...]    values in the list are defaults")
    field_of = {f.name: f for f in fields(Config)}
    group = parser
    entries = re.findall(r"^    (?:# (.+)|(\w+):)", source, re.M)
    added = [f for f in fields(Config) if "help" in f.metadata]
    if added:
        entries.append(("of this variant", ""))
    for f in added:
        entries.append(("", f.name))
        help_of[f.name] = f.metadata["help"]
    for heading, name in entries:
        if heading:
            group = parser.add_argument_group(heading)
            continue
        f = field_of[name]
        kind, alone = f.type, {}
        if f.type is bool:
            kind, alone = true_or_false, {"nargs": "?", "const": True}
        shown = str(f.default) if f.default != "" else '""'
        if f.type is bool:
            shown = shown.lower()
        group.add_argument(f"--{name}", type=kind, default=f.default, metavar=shown,
                           help=help_of[name].replace("%", "%%"), **alone)

    def parse():
        cfg = Config(**vars(parser.parse_args(argv)))
        for name in ("out", "init", "reward"):
            if getattr(cfg, name, ""):
                setattr(cfg, name, os.path.normpath(getattr(cfg, name)).replace(os.sep, "/"))
        return cfg

    cfg = parse()
    if not cfg.resume:
        defaults = getattr(module, "PRETRAINED", {})
        if defaults and cfg.init and is_hf_folder(cfg.init, or_run_from_one=True):
            parser.set_defaults(**defaults)
            flags = " ".join(f"--{name} {x}" for name, x in defaults.items())
            print(f"{cfg.init} is or began as a pretrained model: defaults are {flags}")
        return parse()

    saved = read_settings(cfg.out)
    if saved.get("script") != script_name(Config):
        raise InputError(f"{cfg.out}: this is a run of {saved.get('script')}, not of "
                         f"{script_name(Config)}")
    for name, x in saved.items():
        if name in field_of and name not in ("out", "resume"):
            parser.set_defaults(**{name: str(x)})      # as text, so that it is checked like a flag
    cfg = parse()
    if not os.path.exists(os.path.join(cfg.out, "ckpt.pt")):
        print(f"{cfg.out}: no checkpoint yet, so this run begins again")
        cfg.resume = False
    return cfg


def read_settings(folder):
    """The config.json of a run."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise InputError(f"{folder}: nothing to resume (no config.json)")
    with open(path, encoding="utf-8") as f:
        try:
            return dict(json.load(f))
        except (ValueError, TypeError) as e:
            raise InputError(f"{path}: not the settings of a run ({e})") from None


def script_name(Config):
    """What a script's docstring begins with: SFT, Reward model, PPO for RLHF."""
    return inspect.getmodule(Config).__doc__.split(":")[0].strip()


def check_limits(cfg):
    """Every number is within its limits, and those that belong together fit."""
    ranks = world_size()
    for f in fields(cfg):
        x = getattr(cfg, f.name)
        if f.type not in (int, float):
            continue
        low, high = AT_LEAST.get(f.name, 0), AT_MOST.get(f.name, math.inf)
        if f.name in ABOVE_ZERO and not x > 0:
            raise InputError(f"--{f.name} {x}: must be above 0, {ABOVE_ZERO[f.name]}")
        if f.name in BELOW_HALF and not 0 <= x < 0.5:
            raise InputError(f"--{f.name} {x}: must be from 0 to below 0.5, {BELOW_HALF[f.name]}")
        if abs(x) == math.inf:
            raise InputError(f"--{f.name} {x}: must be finite")
        if not x >= low:                               # nor nan
            raise InputError(f"--{f.name} {x}: must be at least {low}")
        if x > high:
            raise InputError(f"--{f.name} {x}: must be at most {high}")
    if hasattr(cfg, "batch") and cfg.batch < ranks:
        raise InputError(f"--batch {cfg.batch}: too few for {ranks} processes")
    if cfg.test and not cfg.data:
        raise InputError(f"--test {cfg.test}: needs --data; the built-in task has its own rows")
    if not cfg.lora_rank and cfg.lora_alpha != type(cfg).lora_alpha:
        raise InputError(f"--lora_alpha {cfg.lora_alpha}: has no effect without --lora_rank")
    if getattr(cfg, "ref_every", 0) and cfg.lora_rank:
        raise InputError(f"--ref_every {cfg.ref_every}: under --lora_rank the reference is the "
                         "base, which does not move")
    if getattr(cfg, "ref_every", 0) and not cfg.kl_beta:
        raise InputError(f"--ref_every {cfg.ref_every}: there is no reference without --kl_beta")
    if hasattr(cfg, "minibatch"):
        for name in ("prompts", "minibatch"):
            if getattr(cfg, name) % ranks:
                raise InputError(f"--{name} {getattr(cfg, name)}: {ranks} processes cannot share "
                                 "it equally")
        n = cfg.prompts * getattr(cfg, "group_size", 1)
        if n % cfg.minibatch:
            raise InputError(f"--minibatch {cfg.minibatch} does not divide the {n} responses of a "
                             "rollout")
    if hasattr(cfg, "overlong_cache") and cfg.overlong_cache > cfg.max_new_tokens:
        raise InputError(f"--overlong_cache {cfg.overlong_cache}: must be at most --max_new_tokens "
                         f"{cfg.max_new_tokens}")
