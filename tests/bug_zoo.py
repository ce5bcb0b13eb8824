"""The bug zoo: mistakes of public implementations, each as one changed line of our own code, and
the test that finds it. test_bug_zoo.py runs them.

An entry is a name; the file; what is done wrong; where it was seen; the words on our line, what
they become, and the test that must fail. "Seen" names public code as it was when it was read, or,
with a number, an issue or a pull request that reports it there; most of them have been repaired
since. "A slip" has no address: anybody may write such a line.
"""
import contextlib
import os
import shutil
from collections import namedtuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
Bug = namedtuple("Bug", "name file mistake seen old new test")

BUGS = [Bug(*entry) for entry in [

    # masks, pads and positions

    ("no_shift", "model.py",
     "A position is scored by its own hidden state, which has read the token: the loss falls to "
     "0 and nothing is learned.",
     "a slip; labels must be shifted exactly once",
     "self(tokens).flatten(0, 1)[index - 1]",
     "self(tokens).flatten(0, 1)[index]",
     "test_model.py::test_token_logp_scores_masked_positions_and_no_others"),

    ("end_token_untrained", "common/tokenizer.py",
     "The end token of a demonstration is masked out: the model never learns to stop.",
     "pad = eos and masks by id: mlabonne/llm-course #33, huggingface/trl #6357",
     "return ids + response, [0] * len(ids) + [1] * len(response)",
     "return ids + response, [0] * len(ids) + [1] * (len(response) - 1) + [0]",
     "test_sft.py::test_the_loss_trains_the_response_and_its_end_token_and_nothing_else"),

    ("end_token_forced", "common/data.py",
     "Text that does not fit is cut and closed with an end token, which teaches to stop in the "
     "middle.",
     "OpenRLHF, SFT and reward datasets",
     "rows = tokenize_rows(rows, tokenizer, encode)",
     "rows = [r | {'tokens': r['tokens'][:block_size - 1] + [tokenizer.end], 'mask': "
     "r['mask'][:block_size]} for r in (tokenize_demonstration(x, tokenizer) for x in rows)]",
     "test_sft.py::test_long_examples_are_dropped_and_counted_and_never_cut"),

    ("sampled_end_masked", "model.py",
     "The end token that was sampled is outside the mask: the decision to stop gets no gradient.",
     "nanochat chat_rl.py, tiny-grpo train.py",
     "count[alive] += ~done",
     "count[alive] += ~(done | torch.isin(token, stop))",
     "test_model.py::test_the_end_token_is_the_last_of_the_mask_and_pads_follow"),

    ("talks_after_the_end", "model.py",
     "What a finished row says while it waits for the others counts as its response.",
     "ZHZisZZ/dllm #118, verl-project/verl #3805",
     "count[alive] += ~done",
     "count[alive] += 1",
     "test_model.py::test_finished_rows_may_stay_in_the_batch_for_some_steps"),

    ("mask_by_id", "model.py",
     "Pads are found by comparing ids, so with pad = eos the end token is one.",
     "tiny-grpo train.py, rlhf-book rollout.py (where pad falls back to eos)",
     "if mask is None else mask > 0",
     "if mask is None else (mask > 0) & (tokens != 3)",
     "test_model.py::test_pad_may_be_the_end_token"),

    ("pads_attended", "model.py",
     "The pads behind a short prompt are not hidden from its response.",
     "a slip; in the cache, where no causal mask hides them",
     ".masked_fill_(pad, -math.inf)",
     ".masked_fill_(pad, 0.0)",
     "test_model.py::test_sampled_logp_is_the_scored_logp"),

    ("positions_by_width", "model.py",
     "Responses of short prompts are placed as if all prompts were as long as the longest.",
     "unslothai/unsloth #3699; with learned positions huggingface/trl #6800",
     "position = length[:, None].clone()",
     "position = torch.full_like(length, int(length.max()))[:, None]",
     "test_model.py::test_sampled_logp_is_the_scored_logp"),

    ("cache_position_off_by_one", "model.py",
     "The first cached step stands where the prompt's last token stands.",
     "ml-explore/mlx-lm #1396, the other way round",
     "position = length[:, None].clone()",
     "position = length[:, None] - 1",
     "test_model.py::test_greedy_responses_are_those_of_a_loop_without_cache_in_any_batch"),

    ("reads_the_last_column", "model.py",
     "The first response token is predicted from the last column, a pad where the prompt is "
     "short.",
     "right-padded prompts in generate: huggingface/transformers #26569, unslothai/unsloth #772",
     "last = torch.arange(len(prompts)) * P + length - 1",
     "last = torch.arange(len(prompts)) * P + P - 1",
     "test_model.py::test_greedy_responses_are_those_of_a_loop_without_cache_in_any_batch"),

    ("heads_tiled", "model.py",
     "Key heads are dealt to query heads in turn, 0 1 0 1, where the weights mean 0 0 1 1.",
     "onnx/onnx #7274",
     "return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)",
     "return F.scaled_dot_product_attention(q, *(x.repeat(1, q.size(1) // k.size(1), 1, 1) for "
     "x in (k, v)), is_causal=True)",
     "test_model.py::test_grouped_queries_equal_repeated_keys"),

    ("dropout_left_on", "model.py",
     "With dropout the ratio is not 1 before the first step, and every log-prob is noise.",
     "trl's GRPO before #3234, Human-Agent-Society/reef #536",
     "x = x + self.attention(self.norm1(x), rope, cache)",
     "x = x + F.dropout(self.attention(self.norm1(x), rope, cache), 0.1, self.training)",
     "test_grpo.py::test_the_first_step_has_ratio_1_and_nothing_is_clipped"),


    # sampling and scoring

    ("temperature_forgotten", "model.py",
     "Sampled at a temperature, scored without it: π_old is not the policy that spoke.",
     "trl's GRPO before #3029, OpenRLHF/OpenRLHF #853, rlhf-book (samples at .6)",
     "targets, temperature or 1.0)",
     "targets, 1.0)",
     "test_model.py::test_token_logp_scores_masked_positions_and_no_others"),

    ("temperature_twice", "model.py",
     "Logits are divided by τ². Sampler and scorer share the line, so their ratio is still 1.",
     "RL-Align/RL-Kernel #81",
     "logits.div_(temperature)",
     "logits.div_(temperature ** 2)",
     "test_model.py::test_sampling_follows_the_tempered_softmax"),

    ("temperature_not_in_the_gradient", "model.py",
     "A hand-written backward forgets the 1/τ of the chain rule.",
     "a slip",
     "grad[:, None] / ctx.temperature",
     "grad[:, None]",
     "test_model.py::test_fused_logp_and_entropy_and_their_gradient_are_the_naive_ones"),

    ("sampler_untempered", "model.py",
     "The log-probs that the sampler returns are those of the raw logits.",
     "vLLM's default in trl before #4163, prime-rl before #697",
     "p.gather(1, token[:, None])[:, 0].log())",
     "(logits * tau).log_softmax(-1).gather(1, token[:, None])[:, 0])",
     "test_model.py::test_sampled_logp_is_the_scored_logp"),

    ("greedy_is_certain", "model.py",
     "A greedy token is given log-prob 0, as if the policy had had no choice.",
     "a slip; the limit τ = 0 taken at its word",
     "torch.where(done, 0.0, p.gather",
     "torch.where(done | (temperature == 0), 0.0, p.gather",
     "test_model.py::test_greedy_responses_are_those_of_a_loop_without_cache_in_any_batch"),

    ("top_k_sampled_alone", "model.py",
     "Sampled from the five likeliest tokens, scored by all: expectations are over another "
     "policy.",
     "nanochat chat_rl.py (top-k 50), rlhf-book (top-k 20, top-p .95)",
     "p = logits.softmax(-1)",
     "p = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -math.inf).softmax(-1)",
     "test_model.py::test_sampling_follows_the_tempered_softmax"),

    ("half_precision_log_softmax", "model.py",
     "Under bf16 the log-softmax is taken in bf16, whose eight bits are coarser than a policy "
     "update.",
     "why trl's selective_log_softmax has a branch, and OpenRLHF casts logits to float32",
     "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))",
     "logits = logits.log_softmax(-1).to(torch.promote_types(logits.dtype, torch.float32))",
     "test_model.py::"
     "test_half_precision_inputs_give_float32_results_and_gradients_of_the_master_weights"),

    ("entropy_of_the_sample", "model.py",
     "What is logged as entropy is -log π of the sampled token, a one-sample guess at it.",
     "objective/entropy of trl's PPO and of summarize_from_feedback_details",
     "(total.log() - dot / total)[:, 0]",
     "(lse - picked)[:, 0]",
     "test_model.py::test_fused_logp_and_entropy_and_their_gradient_are_the_naive_ones"),

    ("entropy_trains", "model.py",
     "Entropy that is only to be watched is left in the graph.",
     "a slip",
     "ctx.mark_non_differentiable(entropy)",
     "pass",
     "test_model.py::test_fused_logp_and_entropy_and_their_gradient_are_the_naive_ones"),

    ("entropy_divided_twice", "grpo.py",
     "An entropy that is a mean over tokens already is divided by their number again.",
     "nano-aha-moment compute_pg_loss",
     'loss_stats["entropy"] = entropy.sum() / len(index)',
     'loss_stats["entropy"] = entropy.sum() / len(index) ** 2',
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("last_piece_logged", "common/evaluate.py",
     "What is logged is the last micro-batch, not the mean over all.",
     "GRPO-Zero update_policy, CleanRL ppo.py",
     "(weighted + x * weight, w + weight)",
     "(x * weight, weight)",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),


    # supervised and preference losses

    ("mean_of_means", "sft.py",
     "Each micro-batch divides by its own tokens: short responses weigh more, and the split "
     "changes the gradient.",
     "transformers and torchtune until October 2024 (meta-pytorch/torchtune #1875), nanochat "
     "chat_sft.py, rlhf-book",
     "loss = -logp.sum() / n",
     "loss = -logp.sum() / mask.sum().clamp(min=1)",
     "test_sft.py::test_micro_batches_of_any_size_leave_the_gradient_as_it_is"),

    ("mean_of_means_again", "sft.py",
     "The loss can divide by the whole batch, and the loop forgets to tell it: a test of the "
     "loss alone sees nothing.",
     "a slip; the same mistake at the place where the loss is called",
     "sft_loss(logp, mask_dev[rows, :width], n)",
     "sft_loss(logp, mask_dev[rows, :width])",
     "test_sft.py::test_one_step_of_the_script_is_equation_1_whatever_the_micro_batches"),

    ("bradley_terry_upside_down", "reward.py",
     "The rejected response leads: the reward model learns to like what annotators disliked.",
     "a slip; the loss falls as it should",
     "lead = chosen - rejected",
     "lead = rejected - chosen",
     "test_reward.py::test_the_pairwise_loss_is_the_closed_form_with_its_margin"),

    ("ranking_upside_down", "reward.py",
     "The same among K responses: the worse one leads every pair.",
     "a slip",
     "lead = scores[:, :, None] - scores[:, None, :]",
     "lead = scores[:, None, :] - scores[:, :, None]",
     "test_reward.py::test_the_ranking_loss_is_the_mean_over_prompts_of_means_over_pairs"),

    ("margin_wrong_way", "reward.py",
     "A margin that should ask for more is granted for free.",
     "a slip",
     "F.logsigmoid(lead - margin)",
     "F.logsigmoid(lead + margin)",
     "test_reward.py::test_the_pairwise_loss_is_the_closed_form_with_its_margin"),

    ("log_sigmoid_written_out", "reward.py",
     "log(1 + exp(.)) overflows where a pair is far in the wrong order, just where it should "
     "teach.",
     "OpenRLHF LogExpLoss",
     "loss = -F.logsigmoid(lead - margin).sum()",
     "loss = (1 + torch.exp(margin - lead)).log().sum()",
     "test_reward.py::test_huge_differences_stay_finite"),

    ("ties_are_pairs", "reward.py",
     "Equal ranks make a pair, and so does a response with itself.",
     "a slip",
     "kept = (ranks[:, :, None] < ranks[:, None, :])",
     "kept = (ranks[:, :, None] <= ranks[:, None, :])",
     "test_reward.py::test_the_ranking_loss_is_the_mean_over_prompts_of_means_over_pairs"),

    ("pairs_as_rows", "reward.py",
     "All pairs of a batch in one mean: a prompt with six pairs weighs six times as much as one "
     "with one.",
     "what InstructGPT (section 3.5) warns of; trl and OpenRLHF read pairs alone",
     "loss = -log_p.sum() / (len(scores) if n is None else n)",
     "loss = -(F.logsigmoid(lead) * kept).sum() / kept.sum().clamp(min=1)",
     "test_reward.py::test_the_ranking_loss_is_the_mean_over_prompts_of_means_over_pairs"),

    ("score_one_column_early", "model.py",
     "The score is read before the end token, where the value of the last choice is read.",
     "ColossalAI's reward model, hpcaitech/ColossalAI #3950",
     "after.gather(1, last)",
     "after.gather(1, last - 1)",
     "test_model.py::test_value_is_read_one_column_before_the_score"),

    ("score_on_the_pads", "model.py",
     "The score is read in the last column of the batch, a pad for all but the longest.",
     "EleutherAI/gpt-neox #1285",
     "last = (column * (mask > 0)).amax(1, keepdim=True)",
     "last = torch.full((len(tokens), 1), tokens.size(1) - 1)",
     "test_reward.py::test_the_score_is_read_at_the_end_token_alone_or_padded_in_a_batch"),

    ("score_before_the_first_pad_id", "model.py",
     "The end is sought as the first id that is a pad's, which may stand in the prompt or "
     "nowhere.",
     "huggingface/transformers #35352",
     "last = (column * (mask > 0)).amax(1, keepdim=True)",
     "last = ((tokens == 3).int().argmax(1, keepdim=True) - 1).clamp(min=0)",
     "test_reward.py::test_the_score_is_read_at_the_end_token_alone_or_padded_in_a_batch"),

    ("dpo_mean_log_prob", "dpo.py",
     "Log-probs are averaged over tokens: it is no longer the likelihood of the response, and β "
     "means another thing.",
     "jingyaogong/minimind #298",
     "found.append(sequence_logp(logp.cpu(), mask).view(-1, 2))",
     "found.append((logp.sum(1) / mask.sum(1)).view(-1, 2).cpu())",
     "test_dpo.py::test_log_probs_are_sums_over_response_and_end_token_in_any_batch"),

    ("dpo_reference_upside_down", "dpo.py",
     "The reference's preference is added instead of taken away.",
     "a slip",
     "reward_w = beta * (logp_w - ref_w)",
     "reward_w = beta * (logp_w + ref_w)",
     "test_dpo.py::test_the_loss_is_equation_7_by_the_textbook_and_its_statistics_are_means"),

    ("ties_are_right", "dpo.py",
     "Equal rewards count as the right order, so that an untrained policy is always right.",
     "a slip",
     "in_order = (h > 1e-3).float()",
     "in_order = (h >= 0).float()",
     "test_dpo.py::test_at_the_start_the_loss_is_ln_2_and_no_pair_is_in_order"),


    # PPO

    ("kl_penalty_inverted", "ppo.py",
     "The log-ratio in the reward is inverted: the policy is paid for leaving the reference.",
     "rlhf-book loss.py (kl1), nebuly-ai/optimate #298",
     "k1 = torch.where(mask > 0, logp - ref_logp, 0.0)",
     "k1 = torch.where(mask > 0, ref_logp - logp, 0.0)",
     "test_ppo.py::test_the_score_lands_on_the_last_token_and_every_token_pays_the_kl_penalty"),

    ("kl_penalty_clamped", "ppo.py",
     "Negative log-ratios are clamped to 0, and the KL penalty is no longer the KL in the mean.",
     "alpaca_farm ppo_trainer.py",
     "k1 = torch.where(mask > 0, logp - ref_logp, 0.0)",
     "k1 = torch.where(mask > 0, logp - ref_logp, 0.0).clamp(min=0)",
     "test_ppo.py::test_the_score_lands_on_the_last_token_and_every_token_pays_the_kl_penalty"),

    ("bootstraps_past_the_end", "ppo.py",
     "The value behind the last token, of a pad, is taken for what comes next.",
     "radixark/miles before #1827, DeepSpeedExamples #672",
     "value = torch.where(mask > 0, value, 0.0)                             # V = 0 after the end",
     "pass",
     "test_ppo.py::test_gae_is_the_sum_of_discounted_errors_on_ragged_rows"),

    ("writes_into_its_input", "ppo.py",
     "Pads are zeroed in place, through a view of the caller's tensor, which is counted "
     "afterwards.",
     "nano-aha-moment compute_token_log_probs",
     "    reward = torch.where(mask > 0, reward, 0.0)",
     "    reward = reward.masked_fill_(mask == 0, 0.0)",
     "test_ppo.py::test_gae_is_the_sum_of_discounted_errors_on_ragged_rows"),

    ("value_one_column_late", "model.py",
     "The critic has read the token whose choice its value should precede.",
     "huggingface/trl #44, the other way round",
     "return F.pad(self(tokens)[:, :-1], (1, 0))",
     "return self(tokens)",
     "test_model.py::test_value_is_read_one_column_before_the_score"),

    ("returns_after_whitening", "ppo.py",
     "Returns are made of advantages that were whitened: the critic's target has lost its scale.",
     "rlhf-book's PPO computes advantages + old values, sound only as long as nothing whitens "
     "before",
     "return adv, adv + value",
     "return adv, whiten(adv, mask) + value",
     "test_ppo.py::test_gae_is_the_sum_of_discounted_errors_on_ragged_rows"),

    ("whitening_keeps_the_mean", "ppo.py",
     "A flag read the wrong way round: advantages are scaled, and their mean is put back.",
     "torchtune rlhf/rewards.py whiten",
     "return centred / (total(centred.square()) / n + 1e-8).sqrt()",
     "return centred / (total(centred.square()) / n + 1e-8).sqrt() + x.sum() / n",
     "test_ppo.py::test_whitening_is_over_the_mask_alone_and_leaves_its_inputs"),

    ("whitening_over_pads", "ppo.py",
     "The mean is over all columns, pads included.",
     "NovaSky-AI/SkyRL #1305",
     "centred = (x - total(x) / n) * mask",
     "centred = (x - x.mean()) * mask",
     "test_ppo.py::test_whitening_is_over_the_mask_alone_and_leaves_its_inputs"),

    ("value_clip_takes_the_smaller", "ppo.py",
     "The smaller of the two errors: a critic far from its target is left alone.",
     "RLlib in 2018, ray-project/ray #2233",
     "torch.max(error, clipped_error)",
     "torch.min(error, clipped_error)",
     "test_ppo.py::test_the_value_clip_keeps_the_larger_error"),

    ("critic_is_the_reward_model", "common/models.py",
     "The critic is made of the reward model without a copy: what learns to expect the score "
     "also changes it.",
     "a slip",
     "critic = copy.deepcopy(reward_model or policy)",
     "critic = reward_model or policy",
     "test_ppo.py::test_what_the_update_gets_is_what_was_sampled_scored_and_valued"),

    ("truncated_responses_are_scored", "common/train.py",
     "A response without an end token is scored like any other, where the reward model has "
     "never seen one.",
     "what the EOS trick of arXiv 2403.17031 is for; huggingface/trl #3750",
     "raw = torch.where(ended, raw, truncated_reward)",
     "raw = raw",
     "test_ppo.py::test_a_truncated_response_gets_its_penalty_and_never_a_score"),


    # GRPO and DAPO

    ("inverted_clip", "grpo.py",
     "For negative advantages the larger of the two is taken: gradient flows where it should "
     "stop, and stops where it should flow.",
     "rasbt's reasoning-from-scratch, six scripts of chapter 7",
     "surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)",
     "surrogate = torch.min(ratio, ratio.clamp(1 - clip_eps, 1 + clip_eps)) * adv",
     "test_grpo.py::test_the_clip_cuts_the_gradient_only_where_it_would_overshoot"),

    ("clip_alone", "grpo.py",
     "The clip without the min also stops the steps that lead back.",
     "a slip; labml's ppo explains why the min is there",
     "surrogate = torch.min(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)",
     "surrogate = ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv",
     "test_grpo.py::test_the_clip_cuts_the_gradient_only_where_it_would_overshoot"),

    ("flipped_kl", "grpo.py",
     "k3 of the inverted ratio: near the reference it looks the same, far from it it is no KL.",
     "rlhf-book loss.py (kl3)",
     "return torch.expm1(log_ratio) - log_ratio",
     "return torch.expm1(-log_ratio) + log_ratio",
     "test_grpo.py::test_k3_is_the_kl_in_value_and_the_other_kl_in_gradient"),

    ("k1_as_a_loss", "grpo.py",
     "The plain log-ratio as a loss: right in value, and its expected gradient is 0.",
     "verl offers it, kl_loss_type=kl",
     "return torch.expm1(log_ratio) - log_ratio",
     "return -log_ratio",
     "test_grpo.py::test_k3_is_the_kl_in_value_and_the_other_kl_in_gradient"),

    ("kl_penalty_with_the_wrong_sign", "grpo.py",
     "The KL penalty has the sign of the reward.",
     "a slip; lucidrains/PaLM-rlhf-pytorch #38 had it in its KL",
     "per_token = (surrogate - kl_beta * kl) * mask",
     "per_token = (surrogate + kl_beta * kl) * mask",
     "test_grpo.py::test_loss_is_equation_3"),

    ("own_denominator", "grpo.py",
     "Each micro-batch divides by its own responses, so that gradients grow with the number of "
     "pieces.",
     "verl-project/verl #5625, allenai/open-instruct before #1161",
     "    if n is None:",
     "    if True:",
     "test_grpo.py::test_micro_batches_change_no_gradient"),

    ("padded_length", "grpo.py",
     "Responses are divided by the width of the batch instead of their own lengths.",
     "verl's seq-mean-token-sum-norm where no length is set",
     "per_token.sum(1) / length.clamp(min=1)",
     "per_token.sum(1) / mask.size(1)",
     "test_grpo.py::test_loss_is_equation_3"),

    ("unmasked_metrics", "grpo.py",
     "The KL in the log is a mean over pads too, and is understated by their share.",
     "tiny-grpo loss.py; approx_kl of trl's PPO and of summarize_from_feedback_details",
     'loss_stats["kl"] = (old - ref_logp[rows, :width]).sum() / len(index)',
     'loss_stats["kl"] = (old - ref_logp[rows, :width]).mean()',
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("nan_times_zero", "grpo.py",
     "Pads are removed by multiplication, and 0 · inf is nan.",
     "a slip",
     "ref_logp = torch.where(mask > 0, ref_logp, 0.0)",
     "ref_logp = ref_logp * mask",
     "test_grpo.py::"
     "test_garbage_outside_the_mask_changes_neither_loss_nor_gradient_nor_statistics"),

    ("one_group_for_all", "grpo.py",
     "Mean and std are those of the batch, so that easy prompts are praised and hard ones blamed.",
     "XU-YIJIE/grpo-flat #2",
     "r = reward.view(-1, group_size)",
     "r = reward.view(1, -1)",
     "test_grpo.py::test_advantage_is_the_standardised_reward_of_its_own_group"),

    ("tiny_eps", "grpo.py",
     "In float32 the mean of sixteen .3 is not .3, and an eps of 1e-9 makes an advantage of the "
     "difference.",
     "OpenRLHF (1e-9), oat and rlhf-book (1e-8), verl-project/verl #4597",
     "return torch.where(equal, 0.0, adv).flatten()",
     "return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-9)).flatten()",
     "test_grpo.py::test_equal_rewards_have_advantage_exactly_zero"),

    ("biased_std", "grpo.py",
     "numpy's std divides by G, torch's by G - 1: with groups of 2 advantages differ by 1.41.",
     "one-covenant/grail #9, beside the torch.std of trl, verl and OpenRLHF; the paper does not "
     "say",
     "r.std(1, keepdim=True)",
     "r.std(1, keepdim=True, correction=0)",
     "test_grpo.py::test_advantage_is_the_standardised_reward_of_its_own_group"),

    ("rewards_of_other_prompts", "common/train.py",
     "Responses lie prompt by prompt, their rows are repeated batch by batch: each is judged by "
     "another's response.",
     "repeat for repeat_interleave; a slip",
     "rows = [row for row in rows for _ in range(group_size)]",
     "rows = [row for _ in range(group_size) for row in rows]",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("ratio_always_1", "grpo.py",
     "Old log-probs are taken anew at every step: the ratio is 1 for ever and the clip never "
     "acts.",
     "tensorforce/tensorforce #312",
     "old = logp.detach() if on_policy else old_logp[rows, :width]",
     "old = logp.detach()",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("never_shuffled", "grpo.py",
     "Every epoch cuts a rollout into the same minibatches, each of a few prompts.",
     "a slip",
     "torch.randperm(B).split(cfg.minibatch // world_size())",
     "torch.arange(B).split(cfg.minibatch // world_size())",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("reference_moves", "common/models.py",
     "The reference is the policy itself, not a copy: the KL penalty is always 0.",
     "a slip",
     "return freeze(copy.deepcopy(policy), bf16=not moves)",
     "return policy",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("clip_swapped", "dapo.py",
     "The wide side of the clip is the lower one.",
     "a slip",
     "ratio.clamp(1 - clip_low, 1 + clip_high)",
     "ratio.clamp(1 - clip_high, 1 + clip_low)",
     "test_dapo.py::test_the_clip_is_wider_above_than_below"),

    ("token_mean_by_piece", "dapo.py",
     "The token mean is taken in each micro-batch: it is not a token mean.",
     "rlhf-book's dapo, in micro-batches of 2",
     "    if n is None:",
     "    if True:",
     "test_dapo.py::test_micro_batches_change_no_gradient"),

    ("length_is_rewarded", "dapo.py",
     "The length penalty is a reward.",
     "a slip",
     "return ((max_len - cache - length) / max(cache, 1)).clamp(-1, 0)",
     "return ((length - max_len + cache) / max(cache, 1)).clamp(0, 1)",
     "test_dapo.py::test_the_length_penalty_is_equation_13_over_a_table_of_lengths"),

    ("all_right_is_informative", "dapo.py",
     "Groups that are all right are kept, and teach nothing.",
     "a slip",
     "return r.amax(1) > r.amin(1)",
     "return r.amax(1) > 0",
     "test_dapo.py::test_a_group_is_informative_if_its_rewards_differ"),

    ("filter_on_the_shaped_reward", "dapo.py",
     "Groups all wrong pass the filter if their lengths differ, and teach brevity.",
     "NVIDIA-NeMo/RL #2431",
     "differs = informative(raw, cfg.group_size)",
     "differs = informative(reward + soft_overlong(mask_cpu.sum(1), cfg.max_new_tokens, "
     "cfg.overlong_cache), cfg.group_size)",
     "test_dapo.py::"
     "test_dynamic_sampling_fills_the_batch_with_informative_groups_of_the_current_policy"),


    # the verifier

    ("credit_for_a_substring", "grpo.py",
     "The response is right if the number occurs in it, so that writing many numbers pays.",
     "torchtune's GRPO rewards, where 1 is in 100",
     'return float(response.count("#") == 1 and response.split("#")[1] == row["_two_digits"])',
     'return float(row["_two_digits"] in response)',
     "test_grpo.py::test_the_rule_of_the_built_in_task"),

    ("first_mark", "common/verifier.py",
     "The first #### is read, where the response stands behind the last.",
     "openai/grade-school-math, nanochat gsm8k.py",
     'text.rpartition("####")[2].strip().split("\\n")[0]',
     'text.partition("####")[2].strip().split("\\n")[0]',
     "test_numbers.py::"
     "test_the_answer_is_after_the_last_marker_or_in_the_last_box_or_the_last_number"),

    ("numbers_as_text", "grpo.py",
     "Numbers are compared as strings: 42. and 42.0 are wrong.",
     "verl's gsm8k.py; the class [0-9.,] of the official one swallows the full stop",
     "float(answer_number(response) == answer)",
     'float(response.rpartition("####")[2].strip() == '
     'row["answer"].rpartition("####")[2].strip())',
     "test_numbers.py::test_equal_numbers_are_right_and_substrings_are_not"),

    ("format_by_the_tag", "common/verifier.py",
     "Every tag that is found anywhere earns its share, so that writing all of them pays.",
     "rlhf-book, .25 a tag",
     "if marks != 1 or",
     "if marks < 1 or",
     "test_numbers.py::test_the_format_reward_asks_for_a_number_stated_once_and_alone"),

    ("ended_if_pads_follow", "common/tokenizer.py",
     "Whether a response ended is told by a pad behind it: one that ends in the last column is "
     "called cut.",
     "torchtune's PPO recipe",
     "ended = ids and ids[-1] in stop_token_ids",
     "ended = not chosen[-1]",
     "test_reward.py::test_collection_drops_truncated_empty_and_repeated_responses"),


    # what a rollout earned, and what the log says of it

    ("any_score_is_right", "common/verifier.py",
     "Every score above 0 counts as right: with .1 for the form, accuracy is 1 where it is .5.",
     "a slip; nothing shows until somebody gives partial credit",
     "return score >= 1 - 1e-6",
     "return score > 0",
     "test_grpo.py::test_only_a_full_score_is_right_whatever_the_partial_credit"),

    ("truncated_by_the_batch", "common/train.py",
     "A truncated response gets the lowest reward of its batch, which falls as batches grow.",
     "a slip",
     "raw = torch.where(ended, raw, truncated_reward)",
     "raw = torch.where(ended, raw, raw[ended].min())",
     "test_ppo.py::test_a_truncated_response_gets_its_penalty_and_never_a_score"),

    ("equal_responses_differ", "common/train.py",
     "Equal responses of a group are scored in different micro-batches: in bf16 they get "
     "advantages of 1 and more.",
     "a slip; any reward model in half precision",
     "distinct, number = rows.unique(dim=0, return_inverse=True)",
     "distinct, number = rows, torch.arange(len(rows))",
     "test_ppo.py::test_equal_responses_have_equal_scores_and_so_no_advantage"),

    ("unit_of_one", "common/train.py",
     "Where no response of the sample is right, the reward's standard deviation counts as 1: a "
     "nat of KL suddenly costs ten times as much.",
     "a slip; `or 1` against division by 0",
     "max(std, MIN_REWARD_STD)",
     "std or 1.0",
     "test_ppo.py::test_the_unit_of_the_reward_does_not_jump_where_hardly_any_response_is_right"),

    ("lambda_of_short_responses", "ppo.py",
     "λ = .95 comes from responses of 53 tokens: of 300, the first earns 2e-7 of the reward.",
     "the default of trl's PPO, torchtune and summarize_from_feedback_details",
     "gae_lambda: float = 1.0 ",
     "gae_lambda: float = 0.95 ",
     "test_ppo.py::test_with_lambda_below_1_the_first_tokens_of_a_long_response_earn_nothing"),

    ("critic_judges_itself", "ppo.py",
     "The critic's explained variance is of Â + V, which is made of the critic: pure noise "
     "explains .93.",
     "vf_explained_var of verl's metric_utils.py, where λ < 1",
     "explained_variance(old_value, monte_carlo, mask)",
     "explained_variance(old_value, ret, mask)",
     "test_ppo.py::test_what_the_update_gets_is_what_was_sampled_scored_and_valued"),

    ("kl_of_the_moved_policy", "grpo.py",
     "The logged KL compares the policy after its steps with the reference on old responses, "
     "which is no KL.",
     "the kl of trl's GRPO with several updates per rollout",
     "(old - ref_logp[rows, :width]).sum()",
     "(logp.detach() - ref_logp[rows, :width]).sum()",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("overflowing_k3", "grpo.py",
     "One token that the policy has all but given up makes k3 infinite, and the loss NaN.",
     "why verl clamps the log-ratio at 20",
     "log_ratio = (ref_logp - logp).clamp(max=20)",
     "log_ratio = ref_logp - logp",
     "test_grpo.py::test_ratio_and_k3_are_exact_up_to_20_nats_and_never_infinite"),

    ("agreement_counts_once", "common/preferences.py",
     "Annotators who agree on a pair become one row, those who disagree keep one each: .8 is "
     "learned as .7.",
     "a slip; deduplication of preference data",
     "repeated = max(counts.values(), default=0) > 1",
     "repeated = False",
     "test_reward.py::test_every_annotator_counts_when_several_judge_the_same_pair"),

    ("last_step_learns_nothing", "common/optimizers.py",
     "The schedule's last rate is exactly 0: a batch is read and nothing learned.",
     "a slip; transformers' warm-ups have such a step at the start",
     "done = (step - 1 - warmup) / (steps - warmup)",
     "done = (step - warmup) / (steps - warmup)",
     "test_model.py::test_every_step_learns_the_first_and_the_last_included"),

    ("reference_rounds_its_embeddings", "common/train.py",
     "The frozen reference looks its embeddings up in bf16, the policy in float32: the KL does "
     "not start at 0.",
     "any reference loaded in bf16 beside a float32 policy",
     "isinstance(module, nn.Linear)",
     "isinstance(module, (nn.Linear, nn.Embedding))",
     "test_memory.py::test_frozen_matrices_in_bf16_give_the_products_that_autocast_gives"),

    ("float32_cumulative_sum", "model.py",
     "Sampling by a cumulative sum in float32: of 151,936 tokens thousands can never be drawn.",
     "a slip",
     "c = blocks.sum(-1, dtype=u.dtype).cumsum(-1)",
     "c = blocks.sum(-1).cumsum(-1).to(u.dtype)",
     "test_model.py::test_every_token_of_a_large_vocabulary_can_be_drawn"),


    # two forwards that should be one distribution

    ("autocast_around_one", "grpo.py",
     "Old log-probs are computed without autocast, new ones with it: the ratio is not 1 at the "
     "first step.",
     "PaddlePaddle/PaddleNLP #10596",
     "old_logp = compute_logp(policy, tokens, mask_cpu, cfg.temperature, micro_tokens)",
     "old_logp = policy.token_logp(tokens, mask, cfg.temperature)[0].detach()",
     "test_grpo.py::test_in_bf16_too_the_first_step_has_ratio_1"),

    ("final_norm_twice", "model.py",
     "The critic normalises hidden states that the trunk has normalised already. With a trained "
     "scale that is not idempotent.",
     "jingyaogong/minimind #608",
     "hidden = self.trunk(tokens).to(self.head.weight.dtype)",
     "hidden = self.trunk.norm(self.trunk(tokens)).to(self.head.weight.dtype)",
     "test_model.py::test_a_score_is_the_value_of_the_longer_prefix_whatever_the_padding"),

    ("responses_tokenised_again", "grpo.py",
     "The text of a response is tokenised again and other tokens are trained than were sampled.",
     "entrius/gittensor #1709; why trl and verl pass token ids through",
     "mask_cpu = mask.cpu()  ",
     "tokens = torch.tensor([[(tokenizer.encode(tokenizer.decode([t])) or [t])[-1] for t in row] "
     "for row in tokens.tolist()]); mask_cpu = mask.cpu()  ",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("kl_logged_with_its_sign_turned", "grpo.py",
     "The log's KL is the mean of log π_ref/π: it falls as the policy moves away from the "
     "reference.",
     "qiancheng0/ToolRL #52, where it was the loss",
     "(old - ref_logp[rows, :width]).sum()",
     "(ref_logp[rows, :width] - old).sum()",
     "test_grpo.py::test_what_the_update_gets_is_what_was_sampled_and_earned"),

    ("k3_upside_down", "grpo.py",
     "k3 of π/π_ref instead of π_ref/π: its mean over samples of π is no KL.",
     "walkinglabs/hands-on-modern-rl #27",
     "log_ratio = (ref_logp - logp).clamp(max=20)",
     "log_ratio = (logp - ref_logp).clamp(max=20)",
     "test_grpo.py::test_k3_is_the_kl_in_value_and_the_other_kl_in_gradient"),

    ("whitened_by_piece", "ppo.py",
     "Advantages are whitened in each micro-batch: their size changes the gradient.",
     "THUDM/slime #2235 and radixark/miles #3229, by context-parallel rank",
     "logp, old, adv[rows, :width], chosen, cfg.clip_eps, n,",
     "logp, old, whiten(adv[rows, :width], chosen), chosen, cfg.clip_eps, n,",
     "test_ppo.py::test_what_the_update_gets_is_what_was_sampled_scored_and_valued"),


    # the variants

    ("mean_of_probabilities", "experiments/policy_variants.py",
     "GSPO sums probabilities instead of log-probs: s_i is (Σ π / Σ π_old)^(1/|o_i|), not the "
     "geometric mean of the ratios.",
     "a slip; walkinglabs/hands-on-modern-rl #75 has the product for each token instead",
     "total = torch.where(mask > 0, x, 0.0).sum(1, keepdim=True)        # (B, 1)",
     "total = torch.where(mask > 0, x.exp(), 0.0).sum(1, keepdim=True).log()",
     "test_variants.py::test_losses_are_their_formulas_by_plain_loops"),

    ("cap_without_its_one", "experiments/policy_variants.py",
     "CISPO's cap is read as ε_high where it is 1 + ε_high: with .28 every weight is .28.",
     "NovaSky-AI/SkyRL #1928, the other way round",
     ".clamp(max=1 + clip_high)",
     ".clamp(max=clip_high)",
     "test_coefficients.py::test_a_loss_weighs_the_score_of_each_token_by_its_row_of_the_table"),

    ("weight_upside_down", "experiments/policy_variants.py",
     "The weight is π_sampler/π_old: it corrects in the wrong direction.",
     "a slip",
     "torch.where(mask > 0, old_logp - sampler_logp, 0.0)",
     "torch.where(mask > 0, sampler_logp - old_logp, 0.0)",
     "test_family.py::"
     "test_importance_weights_restore_the_expected_gradient_of_one_token_responses"),

    ("student_in_the_graph", "experiments/policy_variants.py",
     "The distillation's advantage keeps the student's gradient: a second term, whose mean is 0 "
     "only where the two policies are equal.",
     "meta-pytorch/torchforge #527",
     "adv = torch.where(mask > 0, ref_logp - old_logp, 0.0)",
     "adv = torch.where(mask > 0, ref_logp - logp, 0.0)",
     "test_coefficients.py::test_a_loss_weighs_the_score_of_each_token_by_its_row_of_the_table"),

    ("teacher_upside_down", "experiments/policy_variants.py",
     "The log-ratio of student and teacher is turned: the student moves away from the teacher.",
     "modelscope/twinkle #112, forward and reverse KL exchanged",
     "adv = torch.where(mask > 0, ref_logp - old_logp, 0.0)",
     "adv = torch.where(mask > 0, old_logp - ref_logp, 0.0)",
     "test_family.py::test_distillation_follows_the_reverse_kl_of_every_visited_state"),

    ("roll_that_moves_nothing", "experiments/preference_variants.py",
     "KTO's z0 comes from pairs that still match: it is the batch's own log-ratio.",
     "rlhf-book; in the middle of an odd batch huggingface/trl #1911",
     "if other != prompt and len(prompt + response) <= block_size:",
     "if len(prompt + response) <= block_size:",
     "test_family.py::test_a_mismatched_pair_has_the_response_of_another_prompt"),

    ("mean_over_pads", "experiments/preference_variants.py",
     "SimPO divides by the padded width: long batches make every response less likely.",
     "hkust-zhiyao/RTL-Coder #9",
     "torch.where(mask > 0, logp, 0.0).sum(1) / mask.sum(1).clamp(min=1)",
     "torch.where(mask > 0, logp, 0.0).sum(1) / mask.size(1)",
     "test_family.py::test_mean_log_probs_are_of_the_tokens_in_the_mask"),

    ("odds_cancel", "experiments/preference_variants.py",
     "log(1 - P) of a nearly certain response loses its digits, then its value.",
     "huggingface/trl #3237; hpcaitech/ColossalAI #6407 adds 1e-4 instead",
     "(-torch.expm1(logp)).log()",
     "torch.log1p(-logp.exp())",
     "test_family.py::test_log_odds_are_exact_where_a_response_is_nearly_certain"),

    ("steps_summed_from_the_start", "experiments/policy_variants.py",
     "The advantage sums the steps that ended before the token, not those after it.",
     "a slip",
     "normalised.flip(1).cumsum(1).flip(1)",
     "normalised.cumsum(1)",
     "test_family.py::test_process_supervision_by_plain_loops"),

    ("best_of_with_replacement", "experiments/best_of_n.py",
     "The best of n is drawn with replacement: too low where n nears the number of samples.",
     "verl-project/verl #7240",
     "math.comb(k, n - 1) / math.comb(N, n)",
     "((k + 1) / N) ** n - (k / N) ** n",
     "test_family.py::test_best_of_n_is_the_mean_over_all_subsets"),

    ("denominator_of_one_process", "sft.py",
     "Each process divides by its own tokens: those of short shares weigh more, and the gradient "
     "depends on the number of processes.",
     "huggingface/transformers #34242",
     "n = int(sum_over_ranks(mask))",
     "n = int(mask.sum())",
     "test_distributed.py::test_the_number_of_processes_changes_no_gradient[sft.py-float32]"),

    ("gradients_averaged_over_processes", "common/distributed.py",
     "Gradients are averaged, as DDP does, though each loss has the denominator of all processes: "
     "Adam hides it, and the clip at --grad_clip acts later.",
     "what pytorch/pytorch #37359 asks to change in DDP; NVIDIA-NeMo/Automodel #3830",
     "dist.all_reduce(message)",
     "dist.all_reduce(message.div_(world_size()))",
     "test_distributed.py::test_the_number_of_processes_changes_no_gradient[grpo.py-float32]"),

    ("whitened_by_process", "ppo.py",
     "Each process whitens the advantages of its own share.",
     "with context parallelism radixark/miles #3229, THUDM/slime #2235",
     "adv = whiten(adv, mask, sum_over_ranks)",
     "adv = whiten(adv, mask)",
     "test_distributed.py::test_the_number_of_processes_changes_no_gradient[ppo.py-float32]"),

    ("same_random_numbers_on_every_process", "common/run.py",
     "All processes sample by the same random numbers.",
     "a slip",
     "torch.manual_seed(cfg.seed + 1_000_003 * rank())",
     "torch.manual_seed(cfg.seed)",
     "test_distributed.py::test_a_rank_draws_random_numbers_of_its_own_and_writes_nothing"),

    ("lora_alpha_undivided", "common/lora.py",
     "Adapters are scaled by α instead of α / r.",
     "Blaizzy/mlx-vlm #841, rasbt/LLMs-from-scratch #821",
     "self.scale = alpha / rank",
     "self.scale = alpha",
     "test_lora.py::"
     "test_new_adapters_sit_on_every_linear_layer_of_the_blocks_and_change_nothing"),

    ("lora_merged_without_its_scale", "common/lora.py",
     "The merged weight lacks the factor α / r that training had.",
     "hao-ai-lab/FastVideo #870",
     "weight = self.weight + self.scale * self.lora_B @ self.lora_A",
     "weight = self.weight + self.lora_B @ self.lora_A",
     "test_lora.py::"
     "test_adapters_compute_what_the_merged_weights_compute_and_have_their_gradient"),
]]


def copied(folder):
    """A copy of the repository's code."""
    for part in (".", "common", "experiments", "tests"):
        os.makedirs(os.path.join(folder, part), exist_ok=True)
        for name in os.listdir(os.path.join(ROOT, part)):
            if name.endswith((".py", ".json")):
                shutil.copy2(os.path.join(ROOT, part, name), os.path.join(folder, part, name))
    return str(folder)


@contextlib.contextmanager
def infected(folder, bug):
    """The copy with the mistake in it."""
    path = os.path.join(folder, bug.file)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    assert text.count(bug.old) == 1, f"stands {text.count(bug.old)} times in {bug.file}: {bug.old}"
    assert "\n" not in bug.old + bug.new
    try:
        with open(path, "w", encoding="utf-8") as f:
            f.write(text.replace(bug.old, bug.new))
        os.utime(path, (0, 0))                         # older than compiled code that is kept
        yield
    finally:
        shutil.copy2(os.path.join(ROOT, bug.file), path)
