"""The variants that change where samples, rewards or preferences come from, against enumeration and
definitions.   python -m pytest tests/test_family.py"""
import itertools
import json
import math
import signal
import sys

import pytest
import torch
from torch.autograd import grad

import best_of_n
import compare
import dpo
import grpo
import policy_variants
import ppo
import preference_variants
import sft
import variants
from common import InputError, load
from common.data import split_rows, tokenize_demonstration
from common.tokenizer import make_tokenizer
from conftest import PPO, QUICK, SHORT, metrics, tiny
from expert_iteration import keep_right, with_response
from grpo import group_advantage, grpo_loss
from model import GPT, GPTConfig
from policy_variants import (Distillation, ProcessSupervision, Replay, distillation_loss,
                             gspo_loss, mis_loss, process_advantage, returns_to_go,
                             running_totals, stale_policy, tis_loss)
from preference_variants import (KTO, ipo_loss, kto_loss, log_odds, mean_logp, mismatched,
                                 orpo_loss, read_labelled, simpo_loss)
from sft import sft_loss
from test_grpo import batch
from test_ppo import tree
from variants import VARIANTS

FINITE = 1e-6                                                  # step of a finite difference


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def conditionals(model, tokens, mask):
    """log π(.|s) (B, T, V) of the state s before every response token."""
    logits = model(tokens) @ model.unembedding.T
    logp = logits.log_softmax(-1)
    return torch.cat([torch.zeros_like(logp[:, :1]), logp[:, :-1]], 1)


# ----------------------------------------------------------------- a sampler that is not the policy


def test_weights_change_nothing_where_the_sampler_is_the_scorer():
    logp, old, ref, adv, mask = batch()
    logp.requires_grad_()
    plain, plain_stats = grpo_loss(logp, old, ref, adv, mask, 0.2, 0.1)
    for loss_function in (tis_loss, mis_loss):
        loss, stats = loss_function(logp, old, ref, adv, mask, 0.2, 0.1, None, old)
        assert torch.equal(loss, plain) and stats.pop("sampler_logp_error") == 0
        assert stats.pop("weight") == 1 and stats.pop("weight_cut") == 0
        assert stats == plain_stats
        assert torch.equal(grad(loss, logp, retain_graph=True)[0],
                           grad(plain, logp, retain_graph=True)[0])


def test_the_difference_of_sampler_and_scorer_is_a_mean_over_the_mask():
    logp, old, ref, adv, mask = batch()
    sampler = old + torch.randn_like(old)
    for loss, stats in (grpo_loss(logp, old, ref, adv, mask, 0.2, 0.1, None, sampler),
                        gspo_loss(logp, old, ref, adv, mask, 0.2, 0.1, None, sampler)):
        expected = (old - sampler)[mask > 0].abs().mean().item()
        assert math.isclose(stats["sampler_logp_error"], expected, rel_tol=1e-12)


@pytest.mark.parametrize("cap", [1e9, 1.5])
def test_importance_weights_restore_the_expected_gradient_of_one_token_responses(cap):
    """By enumeration of the first token: what is sampled from another policy has the gradient of
    another objective; with the weight it has the policy's own; under a cap the tokens above it lack
    exactly what was cut."""
    model, tokens, mask, _, sampler_of = tree(3)
    logp = conditionals(model, tokens[:1], mask)[0, 1]         # (V,)  after the prompt
    params = list(model.parameters())
    V = len(logp)
    torch.manual_seed(0)
    sampler = torch.randn(V).double().log_softmax(-1)
    reward = torch.randn(V).double()
    exact = flat(grad((logp.exp() * reward).sum(), params, retain_graph=True, allow_unused=True,
                      materialize_grads=True))

    def expected_gradient(loss_function, **more):
        total, one = 0.0, torch.ones(1, 1).double()
        for v in range(V):
            x = logp[v].view(1, 1)
            loss, _ = loss_function(x, x.detach(), x.detach(), reward[v:v + 1], one, 0.2, 0.0, None,
                                    sampler[v].view(1, 1), **more)
            total = total - sampler[v].exp() * loss
        return flat(grad(total, params, retain_graph=True, allow_unused=True,
                         materialize_grads=True))

    biased = expected_gradient(grpo_loss)
    corrected = expected_gradient(tis_loss, cap=cap)
    w = (logp.detach() - sampler).exp()
    missing = ((w - w.clamp(max=cap)) * sampler.exp() * reward * logp).sum()
    missing = flat(grad(missing, params, retain_graph=True, allow_unused=True,
                        materialize_grads=True))
    torch.testing.assert_close(corrected + missing, exact, rtol=0, atol=1e-12)
    assert (biased - exact).norm() > 0.1 * exact.norm()
    if cap == 1.5:
        assert (w > cap).any() and missing.norm() > 1e-3

    masked = expected_gradient(mis_loss, lowest=0.5, highest=cap)
    outside = torch.where((w < 0.5) | (w > cap), w, 0.0) * sampler.exp() * reward * logp
    outside = flat(grad(outside.sum(), params, retain_graph=True, allow_unused=True,
                        materialize_grads=True))
    torch.testing.assert_close(masked + outside, exact, rtol=0, atol=1e-12)


def test_weights_of_tokens_leave_the_visited_states_to_the_sampler():
    """What is corrected is the choice of a token, not the prefix before it nor what follows. So for
    responses of several tokens, one reward for all, the expected gradient is not the policy's, and
    need not be nearer to it; the product of a response's weights would restore it."""
    model, tokens, mask, logp, sampler = tree(3)
    params = list(model.parameters())
    torch.manual_seed(0)
    reward = torch.randn(15).double()
    p, q = logp.sum(1).exp(), sampler.sum(1).exp()             # of policy and sampler
    exact = flat(grad((p * reward).sum(), params, retain_graph=True))

    def distance(loss_function, **more):
        total = 0.0
        for i in range(15):
            row = slice(i, i + 1)
            x, adv = logp[row], reward[row] * mask[i].sum()    # a sum over tokens, not their mean
            loss, _ = loss_function(x, x.detach(), x.detach(), adv * weight[i], mask[row], 0.2, 0.0,
                                    None, sampler[row], **more)
            total = total - q[i] * loss
        found = flat(grad(total, params, retain_graph=True))
        return ((found - exact).norm() / exact.norm()).item()

    weight = torch.ones(15).double()
    assert distance(grpo_loss) > 0.1 and distance(tis_loss, cap=1e9) > 0.1
    weight = (p / q).detach()
    assert distance(grpo_loss) < 1e-12


def test_a_stale_sampler_has_the_weights_of_k_rollouts_ago_and_evaluation_those_of_now(monkeypatch):
    policy = tiny()
    monkeypatch.setattr(policy_variants, "load_policy", lambda cfg, device: (policy, None))
    snapshots = []
    stale, _ = stale_policy(grpo.Config(), "cpu", stale=2)
    for step in range(5):
        snapshots.append({name: x.clone() for name, x in policy.state_dict().items()})
        torch.manual_seed(step)
        tokens, _, logp = stale.generate([[7, 8], [9]], 3, 5, 1.0)
        other = tiny()
        other.load_state_dict(snapshots[max(0, step - 2)])
        torch.manual_seed(step)
        expected, _, expected_logp = other.generate([[7, 8], [9]], 3, 5, 1.0)
        assert torch.equal(tokens, expected) and torch.equal(logp, expected_logp)
        greedy, _, _ = stale.generate([[7, 8], [9]], 1, 5, temperature=0.0)
        other.load_state_dict(snapshots[-1])
        assert torch.equal(greedy, other.generate([[7, 8], [9]], 1, 5, temperature=0.0)[0])
        with torch.no_grad():
            for p in policy.parameters():
                p += 0.1 * torch.randn_like(p)
    with pytest.raises(InputError, match="--stale"):
        stale_policy(grpo.Config(resume=True), "cpu", stale=2)


# -------------------------------------------------------------------------------------- the teacher


def test_distillation_follows_the_reverse_kl_of_every_visited_state():
    """By enumeration: the expected gradient is that of Σ_s d(s) KL(π(.|s) ‖ teacher(.|s)) / longest
    with the probability d of visiting s held fixed. The gradient of the KL of whole responses is
    another one: there a token also answers for what follows."""
    model, tokens, mask, logp, teacher_logp = tree(5)
    params = list(model.parameters())
    p = logp.sum(1).exp()
    total = 0.0
    for i in range(15):
        row = slice(i, i + 1)
        x = logp[row]
        loss, _ = distillation_loss(x, x.detach(), teacher_logp[row], torch.zeros(1),
                                             mask[row], 0.2, 1.0, max_new_tokens=7)
        total = total + p[i].detach() * loss
    found = flat(grad(total, params, retain_graph=True))

    every_logp = conditionals(model, tokens, mask)             # (15, T, V)
    teacher = teacher_conditionals(5)
    visited = 0.0
    for i in range(15):
        for t in mask[i].nonzero()[:, 0].tolist():
            kl = (every_logp[i, t].exp() * (every_logp[i, t] - teacher[i, t])).sum()
            visited = visited + p[i].detach() * kl             # Σ over responses through s: d(s)
    exact = flat(grad(visited / 7, params, retain_graph=True))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)

    whole = (p * (logp - teacher_logp).sum(1)).sum()
    of_responses = flat(grad(whole / 7, params, retain_graph=True))
    assert torch.cosine_similarity(found, of_responses, dim=0) < 0.995


def teacher_conditionals(seed):
    """log-probs of the reference of test_ppo.tree in every state."""
    from test_grpo import every_response, three_token_model
    from test_ppo import randomise
    torch.manual_seed(seed)
    model, reference = three_token_model(), three_token_model()
    randomise(model, reference)
    tokens, mask = every_response()
    return conditionals(reference, tokens, mask).detach()


def test_the_teacher_must_read_the_students_tokens(adder, tmp_path, monkeypatch):
    from common.checkpoint import save_checkpoint
    policy, tokenizer = load(str(adder / "out/sft"))
    cfg = grpo.Config(init=str(adder / "out/sft"), data=str(adder / "rows.jsonl"))
    distillation = Distillation()
    student, _ = distillation.load_policy(cfg, "cpu", teacher=str(adder / "out/sft"))
    teacher = distillation.make_reference(student)
    assert teacher is not student and not any(p.requires_grad for p in teacher.parameters())
    shorter = GPT(GPTConfig(**vars(policy.cfg) | {"block_size": 16}))
    save_checkpoint(str(tmp_path), shorter, tokenizer, step=0)
    with pytest.raises(InputError, match="--teacher.*16"):
        distillation.load_policy(cfg, "cpu", teacher=str(tmp_path))


# ------------------------------------------------------------------------------ process supervision


@pytest.mark.parametrize("prompt, response, expected", [
    ("5+8+7=", "13,20#20", [(2, 1.0), (5, 1.0)]),
    ("5+8+7=", "13,21#21", [(2, 1.0), (5, 0.0)]),
    ("5+8+7=", "12,20#20", [(2, 0.0), (5, 1.0)]),
    ("5+8+7=", "13,20,20#20", [(2, 1.0), (5, 1.0), (8, 0.0)]),   # one total too many
    ("5+8+7=", "#20", []),                                     # no working
    ("5+8+7=", "13,20", [(2, 1.0)]),                           # no mark: the rest is the answer
    ("5+8+7=", "13,20#2,0", [(2, 1.0), (5, 1.0)]),             # nothing after the mark is a total
    ("5+8+7=", ",20#20", [(0, 0.0), (3, 1.0)]),
])
def test_a_step_is_a_running_total_right_or_wrong_given_the_prompt(prompt, response, expected):
    row = {"prompt": prompt, "_two_digits": "20"}
    assert running_totals(row, list(response.encode())) == expected


def test_steps_need_the_built_in_task(adder):
    cfg = grpo.Config(init=str(adder / "out/sft"), data=str(adder / "rows.jsonl"))
    with pytest.raises(InputError, match="--data"):
        ProcessSupervision().load_policy(cfg, "cpu")


def test_process_supervision_by_plain_loops():
    """A_it = Σ over the steps of response i that end at or after t of (r - mean)/std, both over all
    steps of the group."""
    torch.manual_seed(0)
    B, T, G = 8, 9, 4
    is_step = torch.rand(B, T) < 0.4
    is_step[:, -1] = True
    reward = torch.where(is_step, torch.randint(0, 3, (B, T)) / 2.0, 0.0).double()
    adv = process_advantage(reward, is_step, G)
    for start in (0, G):
        group = range(start, start + G)
        r = [reward[i, t].item() for i in group for t in range(T) if is_step[i, t]]
        mean = sum(r) / len(r)
        std = math.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - 1))
        for i in group:
            for t in range(T):
                expected = sum((reward[i, k].item() - mean) / (std + 1e-4)
                               for k in range(t, T) if is_step[i, k])
                assert math.isclose(adv[i, t], expected, abs_tol=1e-12)


def test_process_supervision_with_one_step_is_outcome_supervision():
    torch.manual_seed(1)
    reward, mask = torch.tensor([1., 0, 0, 1, .3, .3, .3, .3]).double(), torch.zeros(8, 6)
    is_step, placed = torch.zeros(8, 6, dtype=torch.bool), torch.zeros(8, 6).double()
    for i in range(8):
        last = int(torch.randint(1, 6, ()))
        mask[i, 1:last + 1] = 1
        is_step[i, last], placed[i, last] = True, reward[i]
    adv = process_advantage(placed, is_step, 4)
    outcome = group_advantage(reward, 4)
    assert torch.equal(adv * mask, outcome[:, None] * mask)
    assert (adv[4:] == 0).all()                                # equal rewards: exactly 0


def test_the_rewards_of_steps_stand_where_the_steps_end(monkeypatch):
    """Through compute_reward, with prompts of unequal length, a hasty response and a truncated
    one."""
    tokenizer = make_tokenizer("bytes")
    rows = [{"prompt": "5+8+7=", "_two_digits": "20"}, {"prompt": "9+9+9+9=", "_two_digits": "36"}]
    texts = ["13,20#20", "#20", "18,27,36#36", "18,27,36#3"]
    tokens, mask = torch.zeros(4, 24, dtype=torch.long), torch.zeros(4, 24)
    for i, text in enumerate(texts):
        prompt = tokenizer.encode(rows[i // 2]["prompt"])
        ids = tokenizer.encode(text) + ([tokenizer.end] if i < 3 else [])
        tokens[i, :len(prompt + ids)] = torch.tensor(prompt + ids)
        mask[i, len(prompt):len(prompt + ids)] = 1
    process = ProcessSupervision()
    responses = texts[:3] + [None]
    reward, _, _ = process.compute_reward(grpo.Config(), None, grpo.score, rows, tokens, mask,
                                          responses, 0.0)
    assert reward.tolist() == [1, 1, 1, 0]
    where = [[(t, process.step_reward[i, t].item()) for t in range(24) if process.is_step[i, t]]
             for i in range(4)]
    assert where == [[(8, 1), (11, 1), (14, 1)], [(9, 1)], [(10, 1), (13, 1), (16, 1), (19, 1)],
                     [(17, 0)]]
    adv = process.group_advantage(reward, 2)
    assert adv.shape == (4, 24) and (adv[:2] == 0).all()       # all steps are right
    assert (adv[2, 8:19] > 0).all() and (adv[3, 8:18] < 0).all()


# -------------------------------------------------------------------------------------- REINFORCE++


def test_reinforce_pp_has_the_sum_of_what_follows_for_advantage():
    """R_k of this token and of those that follow, whatever the critic says."""
    torch.manual_seed(0)
    mask = batch()[4]
    reward, value = torch.randn_like(mask), torch.randn_like(mask)
    adv, ret = returns_to_go(reward, value, mask, 1.0, 0.5)
    for i, t in itertools.product(range(8), range(9)):
        expected = sum(reward[i, k].item() for k in range(t, 9) if mask[i, k]) if mask[i, t] else 0
        assert math.isclose(adv[i, t], expected, abs_tol=1e-12)
    assert torch.equal(adv, ret)


# -------------------------------------------------------------------------------------- preferences


def random_pairs(seed=0, P=5):
    torch.manual_seed(seed)
    logp = -torch.rand(P, 2).double() * 6
    ref = logp + torch.randn(P, 2)
    return logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1]


@pytest.mark.parametrize("name, loss_function", [
    ("kto", lambda *x, n=None: kto_loss(*x, 0.7, 0.4, n)),
    ("simpo", lambda *x, n=None: simpo_loss(*x, 2.5, n=n, gamma_ratio=0.3)),
    ("orpo", lambda *x, n=None: orpo_loss(*x, 0.5, n=n)),
    ("ipo", lambda *x, n=None: ipo_loss(*x, 0.3, n=n))])
def test_a_preference_loss_is_its_formula_its_slope_and_a_sum_over_pieces(name, loss_function):
    w, l, ref_w, ref_l = random_pairs()

    def by_hand(w, l, rw, rl):
        def sigmoid(x):
            return 1 / (1 + math.exp(-x))

        if name == "kto":                                      # with λ = 1, over 2 P responses
            v = sigmoid(0.7 * (w - rw - 0.4)), sigmoid(0.7 * (0.4 - (l - rl)))
            return (1 - v[0] + 1 - v[1]) / 2
        if name == "simpo":
            return -math.log(sigmoid(2.5 * (w - l) - 0.75))
        if name == "orpo":
            odds = [math.exp(x) / (1 - math.exp(x)) for x in (w, l)]
            return -w - 0.5 * math.log(sigmoid(math.log(odds[0] / odds[1])))
        return (w - l - rw + rl - 1 / 0.6) ** 2

    expected = sum(by_hand(*(x.item() for x in row)) for row in zip(w, l, ref_w, ref_l)) / 5
    loss, stats = loss_function(w, l, ref_w, ref_l)
    assert math.isclose(loss, expected, rel_tol=1e-12)
    assert stats.keys() >= {"margin", "pair_acc", "logp_w", "logp_l"}
    pieces = []
    for i in torch.arange(5).split(2):
        pieces.append(loss_function(w[i], l[i], ref_w[i], ref_l[i], n=5)[0])
    assert math.isclose(sum(pieces), expected, rel_tol=1e-12)

    w = w.clone().requires_grad_()
    slope, = grad(loss_function(w, l, ref_w, ref_l)[0], w)
    for i in range(5):
        step = torch.zeros(5).double()
        step[i] = FINITE
        up, down = (loss_function(w.detach() + s, l, ref_w, ref_l)[0] for s in (step, -step))
        assert math.isclose(slope[i], (up - down) / (2 * FINITE), rel_tol=1e-6, abs_tol=1e-9)


def test_log_odds_are_exact_where_a_response_is_nearly_certain():
    """log(1 - exp(-1e-5)) by the naive formula in float32 loses three digits; -expm1 none."""
    for x in (-8.0, -1.0, -1e-3, -1e-5):
        exact = x - math.log(-math.expm1(x))
        found = log_odds(torch.tensor(x, dtype=torch.float32)).item()
        assert math.isclose(found, exact, rel_tol=1e-5)
    certain = torch.zeros(1, requires_grad=True)
    assert log_odds(certain).isfinite() and grad(log_odds(certain), certain)


def test_mean_log_probs_are_of_the_tokens_in_the_mask():
    logp, _, _, _, mask = batch()
    for i, mean in enumerate(mean_logp(logp, mask).tolist()):
        inside = [x for x, m in zip(logp[i].tolist(), mask[i]) if m]
        assert math.isclose(mean, sum(inside) / len(inside), rel_tol=1e-12)


def kto_rows():
    """Pairs of two prompts, the second prompt twice: ids 7 to 9 are prompts, 11 to 17 responses."""
    rows = []
    for prompt, responses in (([7], [[11, 3], [12, 13, 3]]), ([8, 9], [[14, 3], [15, 3]]),
                              ([8, 9], [[16, 3], [17, 14, 3]])):
        rows.append({"tokens": [prompt + r for r in responses],
                     "mask": [[0] * len(prompt) + [1] * len(r) for r in responses]})
    return rows


def test_a_mismatched_pair_has_the_response_of_another_prompt():
    """A roll by one would leave two of these three with their own prompt. Responses of both labels
    take part."""
    pairs = [(ids[:mask.index(1)], ids[mask.index(1):]) for ids, mask in mismatched(kto_rows(), 48)]
    desirable = [([7], [14, 3]), ([8, 9], [11, 3]), ([8, 9], [11, 3])]
    undesirable = [([7], [15, 3]), ([8, 9], [12, 13, 3]), ([8, 9], [12, 13, 3])]
    assert pairs == desirable + undesirable
    assert mismatched(kto_rows()[1:], 48) == []                # one prompt
    assert mismatched(kto_rows(), 3) == [([7, 14, 3], [0, 1, 1]), ([7, 15, 3], [0, 1, 1])]


def test_z0_is_the_mean_of_log_ratios_over_mismatched_pairs_of_the_whole_batch(monkeypatch):
    """By a naive log-softmax; never negative, and the loss of a piece uses the batch's."""
    from conftest import naive_logp
    policy = tiny()
    monkeypatch.setattr(preference_variants, "load_policy", lambda cfg, device: (policy, None))
    kto = KTO()
    kto.load_policy(dpo.Config(), "cpu")
    rows = kto_rows()
    batch_iter = kto.batches(rows, 3, seed=0)
    assert sorted(map(str, next(batch_iter))) == sorted(map(str, rows))
    assert kto.z0 == 0                                         # the policy is its reference
    signs = set()
    for seed in range(6):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p, q in zip(policy.parameters(), kto.reference.parameters()):
                p.copy_(q + 0.1 * torch.randn_like(q))
        mean = 0.0
        for ids, mask in mismatched(next(batch_iter), 48):
            with torch.no_grad():
                ids = torch.tensor([ids])
                h = naive_logp(policy, ids) - naive_logp(kto.reference, ids)
            mean += (h * torch.tensor(mask)).sum().item() / 6
        signs.add(mean > 0)
        assert math.isclose(kto.z0, max(0.0, mean), abs_tol=1e-9)
        pair = [torch.tensor([x]).double() for x in (-1.0, -2.0, -1.5, -1.0)]
        loss, stats = kto.dpo_loss(*pair, 0.1, 0.0, 3)         # of a piece of the batch
        assert stats["z0"] == kto.z0
        assert torch.equal(loss, kto_loss(*pair, 0.1, kto.z0, 3)[0])
    assert signs == {True, False}


def test_unpaired_rows_are_read_by_their_labels(tmp_path, capsys):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1 + (i % 3 > 0)), "label": i % 3 == 0}
            for i in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer("bytes")
    kto = KTO()
    train, val, test = kto.load_pairs(str(path), "", tokenizer, 64)
    good = [row for row in read_labelled(str(path)) if row["label"]]
    assert len(good) == 20 and all(int(row["response"]) == eval_sum(row["prompt"]) for row in good)
    wanted = {row["prompt"] for row in rows if row["label"]}
    for pair in train:
        ids, mask = pair["tokens"][0], pair["mask"][0]
        text = tokenizer.decode([x for x, m in zip(ids, mask) if m][:-1])
        assert pair["prompt"] in wanted and text == pair["chosen"]
        assert pair["rejected"] != pair["chosen"]
    n_bad = len({tuple(pair["tokens"][1]) for pair in train})
    assert len(train) == n_bad > len({tuple(pair["tokens"][0]) for pair in train})
    path.write_text('{"prompt": "1+1=", "completion": "2", "label": "yes"}\n')
    with pytest.raises(InputError, match='rows.jsonl:1.*"label"'):
        read_labelled(str(path))
    path.write_text('{"prompt": "1+1=", "label": true}\n')
    with pytest.raises(InputError, match='rows.jsonl:1.*"response"'):
        read_labelled(str(path))
    for label in (True, False):
        lines = [json.dumps(row | {"label": label}) for row in rows]
        path.write_text("\n".join(lines))
        with pytest.raises(InputError, match=f'rows.jsonl.*"label" is {label}'):
            kto.load_pairs(str(path), "", tokenizer, 64)
    lines = [json.dumps(row | {"prompt": "1+1="}) for row in rows]
    path.write_text("\n".join(lines))
    with pytest.raises(InputError):                            # one prompt: of one split, or no KL
        kto.load_pairs(str(path), "", tokenizer, 64)
    pairs = [{"prompt": f"{i}=", "chosen": "1", "rejected": "2", "label": 1} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    assert all(row["chosen"] == "1" for row in kto.load_pairs(str(path), "", tokenizer, 64)[0])


def eval_sum(prompt):
    return sum(int(x) for x in prompt[:-1].split("+"))


# --------------------------------------------------------------------------------- expert iteration


def test_the_expected_gradient_of_expert_iteration_is_that_of_the_mean_reward():
    """By enumeration, one sample a prompt: SFT on the right responses, a sum over tokens, follows
    ∇ E[R] with R 0 or 1, which is REINFORCE's."""
    model, tokens, mask, logp, _ = tree(5)
    params = list(model.parameters())
    right = torch.tensor([1., 0, 1] * 5).double()
    p = logp.sum(1).exp()
    exact = flat(grad((p * right).sum(), params, retain_graph=True))
    total = 0.0
    for i in range(15):
        if right[i]:
            loss, _ = sft_loss(logp[i:i + 1], mask[i:i + 1], n=1)
            total = total - p[i].detach() * loss
    torch.testing.assert_close(flat(grad(total, params)), exact, rtol=0, atol=1e-12)


def test_of_a_conversation_the_sampled_response_alone_is_trained():
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"},
             {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "old"}]
    tokenizer = make_tokenizer("bytes")
    for messages in (turns, turns[:3]):
        row = with_response({"prompt": "2+3=", "messages": messages, "ids": []}, "5")
        row = tokenize_demonstration(row, tokenizer)
        trained = [x for x, m in zip(row["tokens"], row["mask"]) if m]
        assert tokenizer.decode(trained[:-1]) == "5"
        assert "old" not in tokenizer.decode(row["tokens"])


def test_right_responses_are_kept_once_and_the_control_keeps_as_many():
    row = {"prompt": "5+8+7=", "_two_digits": "20"}
    texts = ["#20", "13,20#20", None, "#25", "13,20#20", "12,19#19", "#20"]
    generator = torch.Generator().manual_seed(0)
    kept = keep_right(row, texts, 4, False, generator)
    assert kept == ["#20", "13,20#20"]
    assert keep_right(row, texts, 1, False, generator) == ["#20"]
    drawn = set()
    for _ in range(60):
        control = keep_right(row, texts, 4, True, generator)
        assert len(control) == 2
        drawn |= set(control)
    assert drawn == set(filter(None, texts))                   # right or wrong, but they ended


# ---------------------------------------------------------------------------------------- best of n


def test_best_of_n_is_the_mean_over_all_subsets():
    torch.manual_seed(0)
    score = torch.randint(0, 4, (3, 6)).float()                # with ties
    score[0] = torch.randperm(6).float()
    value = torch.rand(3, 6)
    for n in (1, 2, 3, 6):
        found = best_of_n.mean_best_of(n, score, value)
        for i in range(3):
            best = []
            for subset in itertools.combinations(range(6), n):
                # of equal scores any may be kept: those of all samples with that score share it
                top = max(score[i, k].item() for k in subset)
                same = [value[i, k].item() for k in range(6) if score[i, k] == top]
                best.append(sum(same) / len(same))
            assert math.isclose(found[i], sum(best) / len(best), rel_tol=1e-6)
    right = (torch.rand(5, 8) < 0.3).float()
    for n in (1, 3, 8):                                        # by the rule it is pass@n
        for i, c in enumerate(right.sum(1).int().tolist()):
            found = best_of_n.mean_best_of(n, right, right)[i].item()
            assert math.isclose(found, 1 - math.comb(8 - c, n) / math.comb(8, n), abs_tol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_of_best_of_n_is_the_formula_for_many_outcomes_and_less_for_few(n):
    """Exact: outcome k of K, by rising score, is the best of n with probability
    (F_k)^n - (F_(k-1))^n."""
    for K in (3, 30_000):
        F = torch.arange(K + 1, dtype=torch.float64) / K
        p = F[1:] ** n - F[:-1] ** n
        kl = (p * (p * K).clamp(min=1e-300).log()).sum().item()
        formula = best_of_n.kl_of_best_of(n)
        if K == 3:
            assert kl <= formula + 1e-12
        else:
            assert math.isclose(kl, formula, abs_tol=1e-3)


def test_a_truncated_response_is_never_better_than_one_that_ended(reward_model, adder):
    policy, tokenizer = load(str(adder / "out/sft"))
    model, _ = load(str(reward_model))
    rows = best_of_n.load_rows(str(adder / "rows.jsonl"), tokenizer, 3, policy.cfg.block_size)[:40]
    score, right = best_of_n.sample_and_score(policy, tokenizer, model, rows, 8, 3, 0)
    assert score.shape == right.shape == (40, 8) and 0 < right.mean() < 1
    rows = best_of_n.curve(score, right)
    assert [row["n"] for row in rows] == [1, 2, 4, 8]
    assert [row["n"] for row in best_of_n.curve(score[:, :5], right[:, :5])] == [1, 2, 4, 5]
    for a, b in zip(rows, rows[1:]):
        assert b["score"] >= a["score"] and b["pass@n"] >= a["pass@n"]
    assert math.isclose(rows[0]["accuracy"], right.mean().item(), abs_tol=1e-6)


# ----------------------------------------------------------------------------------------- the runs


def test_replay_adds_the_gradient_of_the_demonstrations_whatever_the_micro_batches(
        adder, monkeypatch):
    policy, tokenizer = load(str(adder / "out/sft"))
    monkeypatch.setattr(policy_variants, "load_policy", lambda cfg, device: (policy, tokenizer))
    cfg = grpo.Config(data="x", minibatch=8)
    found = []
    for budget in (10 ** 6, 40):
        replay = Replay()
        replay.load_policy(cfg, "cpu", replay=str(adder / "rows.jsonl"), sft_coef=0.5)
        policy.zero_grad()
        mask = torch.ones(4, 5)
        pieces = list(replay.micro_batches(mask, torch.arange(4), budget, torch.device("cpu")))
        assert sum(len(rows) for rows, _, _ in pieces) == 4
        found.append(flat([p.grad for p in policy.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    replay = Replay()
    replay.load_policy(cfg, "cpu", replay=str(adder / "rows.jsonl"))
    rows = next(replay.batches)
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor([row["tokens"]])
        logp = (policy(tokens) @ policy.unembedding.T).log_softmax(-1)
        for t, chosen in enumerate(row["mask"]):
            if chosen:
                total, count = total - logp[0, t - 1, tokens[0, t]], count + 1
    expected = flat(grad(0.5 * total / count, list(policy.parameters())))
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(InputError, match="--replay"):
        Replay().load_policy(cfg, "cpu")


@pytest.fixture
def variant(tmp_path, monkeypatch):
    """Run a variant in this process; the scripts' functions come back afterwards. Returns the rows
    of its log, or the line that ended it."""
    def variant(name, *flags):
        script, replacements = VARIANTS[name]
        for function_name in (*replacements, "__doc__"):
            monkeypatch.setattr(script, function_name, getattr(script, function_name))
        monkeypatch.setattr(sys, "argv", ["variants.py"])
        out = tmp_path / "out" / name
        try:
            variants.run(name, [*map(str, flags), "--out", str(out)])
        except SystemExit as end:
            return str(end.code)
        finally:
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)
        return metrics(out)

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.chdir(tmp_path)
    yield variant
    for number, handler in handlers:
        signal.signal(number, handler)


OWN_FLAGS = {"distill": "--teacher", "replay": "--replay"}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "process"])
def test_every_variant_runs_resumes_and_reports(name, variant, adder, reward_model, tmp_path):
    script, _ = VARIANTS[name]
    flags = ["--init", adder / "out/sft", *SHORT]
    if script is grpo:
        flags += ["--data", adder / "rows.jsonl", *QUICK]
    elif script is ppo:
        flags += ["--data", adder / "rows.jsonl", "--reward", "rule", *PPO]
    elif script is dpo:
        flags += ["--data", reward_model / "preferences.jsonl", "--batch", 12, "--eval_every", 3]
    elif script is sft:
        flags += ["--data", adder / "rows.jsonl", "--steps", 6, "--batch", 8, "--eval_every", 3,
                  "--prompts", 60, "--samples", 4]
    else:
        flags += ["--data", adder / "rows.jsonl", *QUICK]
    if name == "distill":
        flags += ["--teacher", adder / "out/sft"]
    if name == "replay":
        flags += ["--replay", adder / "rows.jsonl"]
    logged = variant(name, *flags)
    assert isinstance(logged, list), logged
    assert logged[-1]["step"] >= 6 and "val_greedy" in logged[-1]
    assert math.isfinite(logged[-1]["val_retained_loss"])
    with open(tmp_path / "out" / name / "config.json") as f:
        assert json.load(f)["script"] == name
    if name == "stale":
        assert max(row["sampler_logp_error"] for row in logged[1:]) > 1e-4
    elif name in ("tis", "mis"):
        assert max(row["sampler_logp_error"] for row in logged[1:]) < 1e-4
    again = variant(name, "--resume", "--steps" if script is not dpo else "--batch",
                    8 if script is not dpo else 12)
    assert "--stale" in again if name == "stale" else isinstance(again, list), again


def test_process_supervision_runs_on_the_built_in_task(variant, small):
    logged = variant("process", "--init", small, *QUICK, "--eval_prompts", 8)
    assert isinstance(logged, list) and logged[-1]["step"] == 6


def test_help_lists_every_variant_and_its_own_flags(variant, capsys):
    for name in VARIANTS:
        assert f" {name}" in variants.__doc__, name
    with pytest.raises(SystemExit) as end:
        sys.argv[1:] = ["--help"]
        variants.run("simpo", ["--help"])
    assert not end.value.code


def test_accuracy_at_equal_tokens_is_interpolated():
    rows = [{"val_accuracy": .5}, {"tokens": 10_000}, {"tokens": 10_000, "val_accuracy": .7},
            {"tokens": 20_000, "val_accuracy": .8}]
    found = [compare.accuracy_at(rows, budget) for budget in (0, 5, 20, 30, 100)]
    assert found == pytest.approx([.5, .55, .7, .75, .8])


def test_compare_runs_what_a_run_needs_before_it():
    assert compare.depth("sft") == 0 and compare.depth("grpo") == 1
    assert compare.depth("dpo") == 2 and compare.depth("distill_half") == 2
    assert compare.depth("round_3") == 3
    found = compare.with_dependencies(["distill_half", "grpo"])
    assert found == ["sft", "grpo", "sft_half", "distill_half"]
    assert compare.init_of("round_3", 1) == "out/compare/round_2_1"
    assert compare.origin("round_3", 1) == "out/compare/sft_1"
    assert compare.origin("distill_half", 0) == "out/compare/sft_half_0"
    for name, command in compare.RUNS.items():
        script, *flags = command.format(seed=0).split()
        if script == compare.VARIANT:
            assert flags[0] in VARIANTS, name
            given = variants.make_config(flags[0]).__dataclass_fields__
        else:
            given = __import__(script[:-3]).Config.__dataclass_fields__
        for flag in flags:
            assert not flag.startswith("--") or flag[2:] in given, f"{name}: {flag}"
    named = [name for table in compare.TABLES.values() for name in table]
    assert set(named) <= set(compare.RUNS)
    assert set(compare.MAIN_TABLES) <= set(compare.TABLES)


def test_a_flag_that_a_variant_does_not_use_is_refused(variant, adder):
    flags = ["--init", adder / "out/sft", "--data", adder / "rows.jsonl", *SHORT]
    for name, flag in (("rloo", "--kl_beta"), ("gspo", "--kl_beta"), ("kto", "--label_smoothing"),
                       ("distill", "--kl_beta"), ("orpo", "--sft_coef"),
                       ("expert", "--eval_prompts")):
        line = variant(name, *flags, flag, 0.3 if flag != "--eval_prompts" else 3)
        assert line == f"variants.py: {flag}: {name} does not use it"
    for name, flag, x in (("mis", "--lowest", 3), ("tis", "--cap", .5), ("expert", "--samples", 0),
                          ("distill", "--ref_every", 2)):
        assert variant(name, *flags, flag, x).startswith(f"variants.py: {flag} {x}"), name
    assert "--skip 9999" in variant("expert", *flags, "--skip", 9999)


def test_a_teacher_needs_no_answers(variant, adder, tmp_path):
    rows = [json.dumps({"prompt": f"{i}+{j}="}) for i in range(12) for j in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    logged = variant("distill", "--init", adder / "out/sft", "--data", tmp_path / "prompts.jsonl",
                     *SHORT, *QUICK, "--teacher", adder / "out/sft")
    assert isinstance(logged, list) and logged[-1]["step"] == 6 and "accuracy" not in logged[-1]
    assert abs(logged[1]["kl"]) < 1e-6                         # the student is its own teacher


def test_expert_iteration_reports_on_every_held_out_prompt(variant, adder, capsys):
    flags = ["--init", adder / "out/sft", "--data", adder / "rows.jsonl", *SHORT]
    variant("expert", *flags, "--steps", 3, "--batch", 8, "--eval_every", 3, "--prompts", 40)
    printed = capsys.readouterr().out
    n = len(splits_of(adder)[2])
    assert f"\n{n} held-out prompts" in printed and f"{n} test rows" in printed


def splits_of(adder):
    rows = [json.loads(line) for line in (adder / "rows.jsonl").read_text().splitlines()]
    return split_rows(rows)
