"""
A run from its first step to its last, and what it leaves behind.

    out/NAME/   config.json   metrics.jsonl   ckpt.pt   samples.txt   curves.png
"""
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict

import torch

from common.checkpoint import (hash_weights, load_weights, read_checkpoint,
                               save_checkpoint)
from common.distributed import (disconnect, gather, is_first_to_fail, is_lost_connection, rank,
                                sum_over_ranks, torchrun_is_gone, wait_for_all_ranks, world_size)
from common.early_stopping import EarlyStopping
from common.flags import parse_config, script_name
from common.hf import is_hf_folder
from common.lora import lora_of, trained_state
from common.memory import memory_gb
from common.tokenizer import InputError


class Run:
    """The folder of a run, new or resumed.

    splits: rows to train on, to validate on and to report on. columns: the metrics that are shown
    on the screen. reference: saved only if it moves (--ref_every), else it is --init again, which
    must not have changed. modules: further models whose weights belong to the checkpoint, by name.
    step: steps that are done. state: what the checkpoint keeps besides; a script reads it after
    --resume. Rank 0 alone writes; each rank draws random numbers of its own.
    """

    def __init__(self, cfg, steps, model, optimizer, tokenizer, splits, columns, reference=None,
                 **modules):
        if len(splits[0]) < world_size():
            raise InputError(f"{len(splits[0])} rows to train on are too few for {world_size()} "
                             "processes")
        name = script_name(type(cfg)).split()[0].lower()
        n_params = sum(p.numel() for p in model.parameters())
        n_train, n_val, n_test = (len(rows) for rows in splits)
        device = next(model.parameters()).device
        devices = device.type if world_size() == 1 else f"{world_size()} x {device.type}"
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trained = f", {n_trained:,} of them trained," if n_trained < n_params else ""
        print(f"{name}: {n_params:,} parameters{trained} on {devices}, {n_train:,} training, "
              f"{n_val:,} validation and {n_test:,} test rows")
        if hasattr(cfg, "minibatch"):
            n = cfg.prompts * getattr(cfg, "group_size", 1)
            updates = cfg.epochs * (n // cfg.minibatch)
            note = ": the ratio stays 1 and nothing is clipped" if updates == 1 else ""
            print(f"a rollout has {n} responses and {updates} updates{note}")
        self.out, self.cfg, self.steps, self.columns = cfg.out, cfg, steps, columns.split()
        self.model, self.optimizer, self.tokenizer = model, optimizer, tokenizer
        self.modules = modules
        self.early_stopping = None
        if cfg.early_stopping:
            max_kl = cfg.max_kl if hasattr(cfg, "max_kl") else math.inf
            self.early_stopping = EarlyStopping(max_kl, n_val=n_val)
        self.step = 0
        self.state = {"data_hash": hash_rows(splits)}
        if reference is not None and getattr(cfg, "ref_every", 0):
            self.modules["reference"] = reference
        elif reference is not None:
            self.state["reference_hash"] = hash_weights(reference)
        adapted = [lora_of(module) for module in (model, *modules.values())]
        self.state["base_hash"] = [lora["base_hash"] for lora in adapted if lora]
        self.start = time.perf_counter()
        self.rows = []                                 # of metrics.jsonl
        self.clock = None                              # step and time of the first printed line
        self.interrupted = False
        self.lines = 0                                 # printed so far
        self.is_new = not cfg.resume
        if rank() > 0:
            torch.manual_seed(cfg.seed + 1_000_003 * rank())
        if cfg.resume:
            self.restore(read_checkpoint(self.out))
        wait_for_all_ranks()                           # all have read what lies in --out
        try:
            self.open()
        except OSError as e:
            raise InputError(f"{self.out}: cannot write here ({e.strerror})") from None

    def restore(self, data):
        """Weights, moments and random state as they were at the checkpoint."""
        if not {"step", "state", "optimizer", "rng", "modules"} <= data.keys():
            raise InputError(f"{self.out}: its checkpoint holds a model only; start a run with "
                             f"--init {self.out}")
        if data["state"]["data_hash"] != self.state["data_hash"]:
            raise InputError(f"{self.out}: this run began with other data than --data has now")
        theirs, ours = data.get("lora") or {}, lora_of(self.model) or {}
        for name in ("rank", "alpha"):
            if theirs.get(name) != ours.get(name):
                raise InputError(f"{self.out}: --lora_{name} stays {theirs.get(name, 0)}, as when "
                                 "this run began")
        for name in ("reference_hash", "base_hash"):
            if data["state"].get(name) != self.state.get(name):
                raise InputError(f"{self.out}: this run began with other weights than --init or "
                                 "--reward has now, and they are its reference or the base of its "
                                 "adapters")
        if not isinstance(data["rng"], list):
            raise InputError(f"{self.out}: its checkpoint was written by an earlier version")
        if len(data["rng"]) != world_size():
            raise InputError(f"{self.out}: this run began with {len(data['rng'])} processes, and "
                             f"goes on with as many (torchrun), not with {world_size()}")
        load_weights(self.model, data["model"], f"{self.out}: the flags do not fit its checkpoint")
        for name, module in self.modules.items():
            load_weights(module, data["modules"][name], self.out)
        self.optimizer.load_state_dict(data["optimizer"])
        torch.set_rng_state(data["rng"][rank()])
        if torch.cuda.is_available() and "rng_cuda" in data:
            torch.cuda.set_rng_state(data["rng_cuda"][rank()])
        self.step, self.state = data["step"], data["state"]

    def path(self, name):
        return os.path.join(self.out, name)

    def open(self):
        """A resumed run drops the metrics of steps after its checkpoint. A new run starts with an
        empty folder: an earlier one is renamed, never overwritten."""
        if not self.is_new:
            self.rows = self.read_metrics()
            self.write_rows("metrics.jsonl", self.rows)
            for row in self.rows if self.early_stopping else []:
                self.early_stopping.check(row)
        elif is_hf_folder(self.out):
            raise InputError(f"--out {self.out}: a model that no run made is there; name another "
                             "folder")
        elif rank() == 0 and os.path.exists(self.path("config.json")):
            n = 1
            while os.path.exists(f"{self.out}.{n}"):
                n += 1
            os.replace(self.out, f"{self.out}.{n}")
            print(f"{self.out}: the earlier run is kept as {self.out}.{n}")
        if rank() == 0:
            os.makedirs(self.out, exist_ok=True)
        settings = {"script": script_name(type(self.cfg)), "today": self.tokenizer.today,
                    "pretrained": bool(self.tokenizer.files)}
        settings |= asdict(self.cfg) | {"resume": False}
        self.write("config.json", json.dumps(settings, indent=2))
        path = self.path("metrics.jsonl") if rank() == 0 else os.devnull
        self.metrics_file = open(path, "a", buffering=1, encoding="utf-8")

    def read_metrics(self):
        """The rows of metrics.jsonl up to the checkpoint; a torn last line is dropped."""
        path = self.path("metrics.jsonl")
        if not os.path.exists(path):
            return []
        try:
            with open(path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f if line.endswith("\n")]
            return [row for row in rows if row["step"] <= self.step]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}: not the metrics of a run ({type(e).__name__})") from None

    def write(self, name, text):
        """A whole text file, atomically."""
        if rank() > 0:
            return
        with open(self.path(name + ".tmp"), "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(self.path(name + ".tmp"), self.path(name))

    def write_rows(self, name, rows):
        """JSON lines, as read_rows reads them."""
        self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    # ------------------------------------------------------------------------------------ the steps

    def remaining_steps(self):
        return range(self.step + 1, self.steps + 1)

    def is_eval_step(self, step):
        return step == self.steps or step % self.cfg.eval_every == 0

    def end_step(self, step, metrics):
        """Log, stop early if a rule is broken, and save at every evaluation, at the last step and
        after Ctrl-C."""
        reason = self.log(step, metrics)
        self.step = step
        if reason:
            self.stop_early(reason)
        ends = self.interrupted or torchrun_is_gone()
        interrupted = sum_over_ranks(torch.tensor(ends)) > 0          # one rank ends all
        if interrupted or self.is_eval_step(step):
            self.save()
        if interrupted:
            raise KeyboardInterrupt(f"step {step} is saved, --resume goes on from it")
        if step == self.steps:                         # nothing is left to be saved
            self.set_signal_handler(self.on_signal, signal.default_int_handler)

    def log(self, step, metrics):
        """A line of metrics.jsonl and a line on the screen. Returns the rule that is broken."""
        memory = memory_gb()
        row = {"step": step} | metrics | {"mem_gb": round(memory, 3)}
        self.rows.append(row)
        self.metrics_file.write(json.dumps(row) + "\n")
        if step == 0:
            self.print_before()
        is_first = self.clock is None
        if is_first:
            self.clock = step, time.perf_counter()
            self.set_signal_handler(signal.default_int_handler, self.on_signal)
        is_shown = is_first or step % 10 == 0 or self.is_eval_step(step)
        if self.steps > 200 and not is_shown:          # a long run shows every tenth step
            return self.check_early_stopping(row)
        if self.lines % 20 == 0:                       # the names again
            names = [f"{name:>6}" for name in self.columns]
            print("  ".join([f"{'step':<9}", *names, "mem_gb", "left"]))
        self.lines += 1
        cells = [f"{step:4}/{self.steps:<4}"]
        for name in self.columns:
            cell = format_number(row[name]) if name in row else ""
            cells.append(f"{cell:>{max(6, len(name))}}")
        cells.append(f"{memory:6.1f}")
        if not is_first:                               # the time left is known from the second line
            first, start = self.clock
            left = int((time.perf_counter() - start) / (step - first) * (self.steps - step))
            cells.append(f"{left // 60}:{left % 60:02}")
        print("  ".join(cells), flush=True)
        return self.check_early_stopping(row)

    def print_before(self):
        """What the evaluation before the first step cost and found."""
        metrics, _ = self.state["before"]
        found = ", ".join(f"{name} {x:.3f}" for name, x in metrics.items())
        print(f"before the first step, in {time.perf_counter() - self.start:.0f} s: {found}")

    def check_early_stopping(self, row):
        """The rule that a row of metrics breaks, or None."""
        if self.early_stopping is None:
            return None
        return self.early_stopping.check(row)

    def save(self, name="ckpt.pt"):
        """All that `restore` needs to go on from here."""
        random_state = {"rng": gather(torch.get_rng_state())}
        if torch.cuda.is_available():
            random_state["rng_cuda"] = gather(torch.cuda.get_rng_state())
        modules = {name: trained_state(module) for name, module in self.modules.items()}
        if rank() == 0:
            save_checkpoint(
                self.out, self.model, self.tokenizer, name, step=self.step,
                finished=self.step == self.steps, optimizer=self.optimizer.state_dict(),
                state=self.state, modules=modules, **random_state)
        wait_for_all_ranks()                           # torchrun ends all when one leaves

    def stop_early(self, reason):
        """The state now goes to stopped.pt, the last good checkpoint stays, and the run ends."""
        self.save("stopped.pt")
        good = self.path("ckpt.pt") if os.path.exists(self.path("ckpt.pt")) else "none yet"
        raise InputError(f"stopped early at step {self.step}: {reason}; last good checkpoint: "
                         f"{good}, state at the stop: {self.path('stopped.pt')}; --early_stopping "
                         "false disables this")

    def set_signal_handler(self, old, new):
        """Ctrl-C and a scheduler's SIGTERM call `new`, where they would have called `old`."""
        if threading.current_thread() is threading.main_thread():      # Python's rule
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) == old:
                    signal.signal(number, new)

    def on_signal(self, number, frame):
        """`end_step` saves and ends the run; the same signal again ends it at once."""
        self.interrupted = True
        if world_size() > 1:                           # torchrun repeats it, and kills after 30 s
            return
        signal.signal(number, signal.default_int_handler)
        print("\ninterrupted: this step is finished and saved first; once more ends it at once",
              file=sys.stderr)

    # -------------------------------------------------------------------------------------- the end

    def report(self, rows, before, after):
        """The end of a run: metrics and greedy responses on held-out rows, before -> after. before
        and after are what `evaluate` returned."""
        print(f"\n{len(rows)} held-out prompts, before -> after")
        print_before_after(before[0], after[0])
        for title, (_, texts) in (("before", before), ("after", after)):
            if texts:
                print(f"{title}\n" + self.write_samples(title, rows, texts))

    def write_samples(self, title, rows, texts, n=3):
        """Append a few prompts with their responses to samples.txt; returns them as text."""
        text = ""
        for row, response in list(zip(rows, texts))[:n]:
            text += f"    {row['prompt']!r} -> {response!r}\n"
        if rank() == 0:
            with open(self.path("samples.txt"), "a", encoding="utf-8") as f:
                f.write(f"{title}\n{text}")
        return text

    def plot(self, *panels):
        """curves.png: a panel for each string of metric names, where matplotlib is installed."""
        if rank() > 0:
            return
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            print("pip install matplotlib to get curves.png")
            return
        size = (3.6 * len(panels), 2.8)
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
        for axis, names in zip(axes, panels):
            for name in names.split():
                rows = [row for row in self.rows if name in row]
                axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
            axis.set_xlabel("step")
            axis.legend()
        figure.savefig(self.path("curves.png"), dpi=120)
        plt.close(figure)


def hash_rows(splits):
    """SHA-256 of all rows; a resumed run refuses data with another hash."""
    digest = hashlib.sha256()
    for rows in splits:
        for row in rows:
            fields = [(name, x) for name, x in sorted(row.items()) if not name.startswith("_")]
            digest.update(repr(fields).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def format_number(x):
    """At most six characters, so that the lines of a run stand in columns."""
    if isinstance(x, int) or abs(x) >= 1000:
        return f"{x:5.0f}"
    if 0 < abs(x) < 0.001:
        return f"{x:5.0e}"
    return f"{x:5.3f}" if abs(x) < 10 else f"{x:5.1f}"


def print_before_after(before, after):
    """The table that ends a run; what was not measured before is blank there."""
    for name, x in after.items():
        old = f"{before[name]:.3f}" if name in before else ""
        print(f"    {name:14} {old:>7} -> {x:.3f}")


def prefixed(prefix, metrics):
    """{"greedy": x} -> {"val_greedy": x}"""
    return {prefix + name: x for name, x in metrics.items()}


def main(train, Config):
    """What `python script.py` does: parse, train, and end in one line if the input was invalid. Of
    several ranks, rank 0 prints, and the first that fails says why."""
    name = os.path.basename(sys.argv[0])
    what_stands = "the last checkpoint is kept, --resume continues from it"
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    sys.stdout.reconfigure(errors="backslashreplace")       # a log file in an old encoding has no ε
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's Ctrl-C
    try:
        train(parse_config(Config))
        disconnect()
        return
    except InputError as e:
        reason = f"{name}: {e}"
    except torch.OutOfMemoryError as e:                       # of the GPU
        reason = (f"{name}: {str(e).split('. ')[0]}; to use less memory: --gradient_checkpointing "
                  "true, a smaller --micro_batch_tokens (16384 by default), or shorter responses; "
                  f"{what_stands}")
    except OSError as e:                                      # a full disk, a folder that went away
        reason = f"{name}: {e.filename or 'output'}: {e.strerror or e}; {what_stands}"
    except KeyboardInterrupt as e:
        reason = f"\n{name}: interrupted; {str(e) or what_stands}"
    except RuntimeError as e:
        if not is_lost_connection(e):
            raise
        reason = f"{name}: another process has ended; {what_stands}"
    sys.exit(reason if is_first_to_fail() else 1)
