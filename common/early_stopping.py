"""
Rules by which a run that has gone wrong ends.
"""
import math


class EarlyStopping:
    """Detects that a run has gone wrong, and by which rule. It keeps counts only, which a resumed
    run computes again from its metrics."""

    def __init__(self, max_kl=math.inf, n_val=0):
        """n_val: validation prompts, which give the noise of the validation accuracy."""
        self.max_kl, self.n_val = max_kl, n_val
        self.patience = {"kl": 5, "eos_rate": 5, "no_signal": 50}      # steps in a row
        self.count = dict.fromkeys(self.patience, 0)
        self.best = (0.0, 0.0)                         # accuracy and score of the best evaluation
        self.hacked = 0                                # evaluations in a row that look hacked

    def check(self, m):
        """The rule that this step's metrics break, or None. A metric that is absent breaks none."""
        for name, x in m.items():
            if not math.isfinite(x):
                return f"{name} is {x}"
        broken = {
            "kl": m.get("kl_seq", 0) > self.max_kl,
            "eos_rate": m.get("eos_rate", 1) < .05,
            "no_signal": m.get("pass_at_g", 1) == 0 and m.get("frac_zero_std", 1) == 1,
        }
        for name in self.count:
            self.count[name] = self.count[name] + 1 if broken[name] else 0
        if self.count["kl"] >= self.patience["kl"]:
            return (f"KL to the reference above {self.max_kl} nats per response for "
                    f"{self.count['kl']} steps")
        if self.count["eos_rate"] >= self.patience["eos_rate"]:
            return f"fewer than 5% of responses ended, for {self.count['eos_rate']} steps"
        if self.count["no_signal"] >= self.patience["no_signal"]:
            return (f"no response was right for {self.count['no_signal']} steps: all advantages "
                    "are 0")
        if self.n_val and "val_accuracy" in m and "val_score" in m:
            return self.check_over_optimisation(m["val_accuracy"], m["val_score"])
        return None

    def check_over_optimisation(self, accuracy, score):
        """Score rises while accuracy falls by two standard errors, at two evaluations in a row."""
        best, its_score = self.best
        noise = 2 * math.sqrt((best * (1 - best) + accuracy * (1 - accuracy)) / self.n_val)
        self.hacked = self.hacked + 1 if accuracy < best - noise and score > its_score else 0
        self.best = max(self.best, (accuracy, score))
        if self.hacked < 2:
            return None
        return (f"the reward model's score rose from {its_score:.2f} to {score:.2f} while held-out "
                f"accuracy fell from {best:.3f} to {accuracy:.3f}: the policy exploits the model")
