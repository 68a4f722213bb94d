"""What `asymvq benchmark mutants` breaks: a piece of text, by what it is replaced, and the tests that must fail."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One small change of a file after which at least one of the tests fails."""

    name: str
    file: str
    # Occurs exactly once in the file.
    old: str
    new: str
    # As pytest names them.
    tests: tuple[str, ...]


STEP, LOOP = "asymvq_jax/training/step.py", "asymvq_jax/training/loop.py"
OPTIMIZER, CHECKPOINTS = "asymvq_jax/training/optimizer.py", "asymvq_jax/training/checkpoints.py"
PIPELINE, MASKS = "asymvq_jax/data/pipeline.py", "asymvq_jax/data/masks.py"
SEAM, DRIFT, ROWS = "asymvq_jax/evaluation/seam.py", "asymvq_jax/evaluation/drift.py", "asymvq_jax/evaluation/rows.py"
MAPPING, ADVERSARIAL = "asymvq_jax/convert/mapping.py", "asymvq_jax/losses/adversarial.py"


def _tests(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}::{name}" for name in names)


VQ_STEP = _tests("training/test_step.py", "test_vq_first_stage_step_equals_torch")
TORCH_STEP = _tests("training/test_step.py", "test_step_equals_torch")
ACCUMULATED = _tests("training/test_step.py", "test_accumulated_gradients_equal_the_whole_batch")
FINISHED_RUN = _tests(
    "training/test_training.py", "test_a_run_leaves_metrics_pictures_and_the_last_and_best_checkpoints"
)
OTHER_RUN = _tests("training/test_training.py", "test_another_configuration_is_refused")
LOGGED = _tests("training/test_training.py", "test_images_per_second_and_the_learning_rate_are_logged")
MEANS = _tests("training/test_training.py", "test_logged_metrics_are_means_over_the_interval")
DAMAGED = "training/test_damaged_runs.py"
CROPS = _tests("data/test_data.py", "test_crops_have_the_share_and_lie_anywhere")
HELD_OUT = _tests("data/test_data.py", "test_held_out_crops_follow_the_config_after_the_centre")
ROW_NAMES = _tests("evaluation/test_seam.py", "test_rows_and_metrics_have_their_names")
DRIFTED = _tests("evaluation/test_seam.py", "test_lighter_is_positive_and_blurred_is_less_sharp")
EDITS = _tests("evaluation/test_seam.py", "test_many_edits_keep_what_is_pasted")
DIFFUSERS = _tests("convert/test_convert.py", "test_diffusers_loads_our_folder_and_decodes_the_same")
ORIGINAL = _tests("convert/test_convert.py", "test_original_checkpoint_with_all_that_surrounds_it")
TERMS = _tests("losses/test_losses.py", "test_adversarial_terms")

MUTATIONS = (
    Mutation(
        "the discriminator is never updated",
        STEP,
        "_replace(discriminator=params, discriminator_optimizer=optimizer)",
        "_replace(discriminator_optimizer=optimizer)",
        TORCH_STEP,
    ),
    Mutation("steps are not counted", STEP, "step=state.step + 1", "step=state.step", TORCH_STEP),
    Mutation(
        "the posterior's key is the same at every step",
        STEP,
        "jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)",
        "jax.random.wrap_key_data(state.key)",
        TORCH_STEP,
    ),
    Mutation("the GAN is pushed away", STEP, "cotangent + weight * gan", "cotangent - weight * gan", VQ_STEP),
    Mutation("the GAN's weight is left out", STEP, "config.loss.gan_weight * adaptive", "adaptive", VQ_STEP),
    Mutation(
        "the batch statistics see the real pictures less",
        STEP,
        "for seen in (of_fake, of_real, of_fake):",
        "for seen in (of_fake, of_fake):",
        TORCH_STEP,
    ),
    Mutation(
        "the discriminator learns from real pictures alone",
        STEP,
        "jax.tree.map(jnp.add, pull_real(at_real_d)[0], pull_fake(at_fake_d)[0])",
        "pull_real(at_real_d)[0]",
        TORCH_STEP,
    ),
    Mutation(
        "the moving average moves at once",
        STEP,
        "1 - config.optimizer.ema_decay",
        "config.optimizer.ema_decay",
        ACCUMULATED,
    ),
    Mutation("accumulated gradients are summed", STEP, "lambda x: x / count, total", "lambda x: x, total", ACCUMULATED),
    Mutation(
        "the encoder sees no corruption",
        STEP,
        "model.encode(seen)",
        "model.encode(image)",
        _tests("training/test_corruption.py", "test_a_step_encodes_the_corrupted_picture_and_aims_at_the_clean_one"),
    ),
    Mutation(
        "preservation over the masked pixels",
        STEP,
        "jnp.broadcast_to(1.0 - mask,",
        "jnp.broadcast_to(mask,",
        _tests("training/test_step.py", "test_preservation_is_taken_over_the_preserved_pixels"),
    ),
    Mutation(
        "the KL term's weight grows with the picture",
        STEP,
        "c.kl_weight * factor / elements",
        "c.kl_weight * factor",
        _tests("training/test_step.py", "test_the_latents_penalties_keep_their_balance_with_the_reconstruction"),
    ),
    Mutation(
        "the discriminator starts a step late",
        LOOP,
        "0 <= self.config.loss.gan_start <= step",
        "0 <= self.config.loss.gan_start < step",
        _tests("training/test_training.py", "test_the_discriminator_starts_after_gan_start_steps_and_learns"),
    ),
    Mutation(
        "images/s too high by a factor",
        LOOP,
        "lap.steps_per_second * self.config.data.batch_size",
        "lap.steps_per_second * 8 * self.config.data.batch_size",
        LOGGED,
    ),
    Mutation("the next step's learning rate", LOOP, "self.schedule(step - 1)", "self.schedule(step)", LOGGED),
    Mutation(
        "the last metrics stand for the interval",
        LOOP,
        "float(np.mean([m[name] for m in values if name in m]))",
        "float(values[-1][name])",
        MEANS,
    ),
    Mutation("metrics are reported twice", LOOP, " " * 16 + "pending = []", " " * 16 + "pending = pending[-1:]", MEANS),
    Mutation(
        "a step without finite figures is saved",
        LOOP,
        "self._check_good(step, held_out)",
        "self._check_good(step, {})",
        _tests("training/test_training.py", "test_a_step_is_saved_only_if_its_figures_and_its_state_are_finite"),
    ),
    Mutation(
        "the discriminator's schedule lasts as long as the run",
        OPTIMIZER,
        "config.run.steps - max(config.loss.gan_start, 0)",
        "config.run.steps",
        _tests("training/test_step.py", "test_the_discriminators_schedule_ends_with_the_run"),
    ),
    Mutation(
        "the warm-up begins at a tenth",
        OPTIMIZER,
        "WARMUP_SHARE = 0.01",
        "WARMUP_SHARE = 0.1",
        _tests("training/test_step.py", "test_learning_rate_is_the_reference_schedule"),
    ),
    Mutation(
        "the condition branch takes the share",
        OPTIMIZER,
        '{"new": 1.0, "rest": c.pretrained_scale}',
        '{"new": c.pretrained_scale, "rest": 1.0}',
        _tests("training/test_step.py", "test_pretrained_parameters_take_a_share_of_the_rate"),
    ),
    Mutation("the worst step is kept for the best", CHECKPOINTS, "reverse=True,\n", "reverse=False,\n", FINISHED_RUN),
    Mutation(
        "another scaling factor may resume",
        CHECKPOINTS,
        '"model.remat",',
        '"model.remat", "model.scaling_factor",',
        _tests("training/test_training.py", "test_another_latent_is_refused_on_resuming"),
    ),
    Mutation("another seed may resume", CHECKPOINTS, '_FIXED = ("run.seed", ', "_FIXED = (", OTHER_RUN),
    Mutation(
        "a run resumes from its first step",
        CHECKPOINTS,
        "sorted(self._manager.all_steps(), reverse=True)",
        "sorted(self._manager.all_steps())",
        _tests(DAMAGED, "test_a_run_goes_back_to_the_sound_step_when_asked"),
    ),
    Mutation(
        "numbers that are not finite resume",
        CHECKPOINTS,
        "if not bool(all_finite(state)):",
        "if False:",
        _tests(DAMAGED, "test_numbers_that_are_not_finite_are_damage"),
    ),
    Mutation(
        "a changed progress resumes",
        CHECKPOINTS,
        "not in (None, _digest(progress))",
        "is ...",
        _tests(DAMAGED, "test_what_the_files_do_not_guard_is_guarded"),
    ),
    Mutation(
        "changed arrays resume",
        CHECKPOINTS,
        "check_fingerprints(_arrays(state), progress.pop(FINGERPRINTS, {}))",
        "progress.pop(FINGERPRINTS, {})",
        _tests(DAMAGED, "test_what_the_files_do_not_guard_is_guarded"),
    ),
    Mutation(
        "saving asks whether to stop",
        CHECKPOINTS,
        "        return False\n",
        "        return bool(super().reached_preemption(step))\n",
        _tests(DAMAGED, "test_saving_does_not_ask_whether_to_stop"),
    ),
    Mutation("crops ignore the share", PIPELINE, "int(share * min(height, width))", "min(height, width)", CROPS),
    Mutation("crops lie at the top", PIPELINE, "top = int(rng", "top = 0 * int(rng", CROPS),
    Mutation("crops lie at the left", PIPELINE, "left = int(rng", "left = 0 * int(rng", CROPS),
    Mutation(
        "crops are resized by the nearest pixel",
        PIPELINE,
        "cv2.INTER_AREA",
        "cv2.INTER_NEAREST",
        _tests("data/test_data.py", "test_crops_are_resized_by_area"),
    ),
    Mutation(
        "held-out crops ignore the config",
        PIPELINE,
        "share = 1.0 if i < len(source) else rng.uniform(*config.crop)",
        "share = 1.0",
        HELD_OUT,
    ),
    Mutation(
        "held-out pictures lose their centre", PIPELINE, "(height - side) // 2, (width - side) // 2", "0, 0", HELD_OUT
    ),
    Mutation(
        "held-out pictures ignore min_side",
        PIPELINE,
        "_read(source, config.min_side, i % len(source), rng)",
        "_read(source, 0, i % len(source), rng)",
        _tests("data/test_data.py", "test_held_out_pictures_are_not_below_the_least_side"),
    ),
    Mutation(
        "held-out masks may be full",
        PIPELINE,
        "if mask.any() and not mask.all():",
        "if mask.any():",
        _tests("data/test_data.py", "test_held_out_masks_are_partial"),
    ),
    Mutation(
        "every process takes the whole batch",
        PIPELINE,
        "[process_index::process_count]",
        "",
        _tests("data/test_data.py", "test_processes_share_the_global_batch"),
    ),
    Mutation(
        "mirrored upside down",
        PIPELINE,
        "image[:, ::-1]",
        "image[::-1]",
        _tests("data/test_data.py", "test_mirrored_and_recoloured_training_pictures"),
    ),
    Mutation(
        "any share of corrupt files will do",
        PIPELINE,
        "> self._max_share * files",
        "> files",
        _tests("data/test_data.py", "test_corrupt_files_are_replaced_counted_and_named"),
    ),
    Mutation(
        "strokes are not mirrored",
        MASKS,
        "angle = 2 * math.pi - angle",
        "angle = 1 * angle",
        _tests("data/test_masks.py", "test_presets_have_lamas_numbers"),
    ),
    Mutation("preserved pixels are taken under the mask", SEAM, "truth, ~inside)", "truth, inside)", ROW_NAMES),
    Mutation(
        "colours are matched to themselves",
        SEAM,
        "* contrast + outside.mean(0)",
        "* contrast + inside.mean(0)",
        _tests("evaluation/test_seam.py", "test_matched_colours_have_the_ring_s_statistics"),
    ),
    Mutation(
        "the contrast is matched the wrong way round",
        SEAM,
        "(lab - inside.mean(0)) * contrast",
        "(lab - inside.mean(0)) / contrast",
        _tests("evaluation/test_seam.py", "test_matched_colours_have_the_ring_s_statistics"),
    ),
    Mutation(
        "gradient errors without their factor",
        SEAM,
        '("gradient error x 1e-3", 1e3)',
        '("gradient error x 1e-3", 1.0)',
        _tests("evaluation/test_seam.py", "test_tables_show_what_was_measured_times_its_factor"),
    ),
    Mutation("too little grain is a gain", SEAM, '"grain": abs(octaves)', '"grain": octaves', ROW_NAMES),
    Mutation("lighter is darker", DRIFT, "(lightness - first)[kept]", "(first - lightness)[kept]", DRIFTED),
    Mutation("blurred is sharper", DRIFT, "now.mean() / before.mean()", "before.mean() / now.mean()", DRIFTED),
    Mutation("sharpness under the mask counts", DRIFT, "np.gradient(x))[within]", "np.gradient(x))", DRIFTED),
    Mutation(
        "every pass begins with the original",
        DRIFT,
        "decode(image, mask, models.encode(image), pasted)",
        "decode(original, mask, models.encode(original), pasted)",
        _tests("evaluation/test_seam.py", "test_drift_is_measured_against_the_first_original"),
    ),
    Mutation("edited pixels count as untouched", DRIFT, "untouched &= ~region", "untouched &= True", EDITS),
    Mutation("fills are compared with the original", DRIFT, "first[region] = now", "first[region] = image", EDITS),
    Mutation(
        "preservation errors without their factor",
        ROWS,
        '("preservation error x 1e-5", 1e5)',
        '("preservation error x 1e-5", 1.0)',
        _tests("evaluation/test_evaluation.py", "test_rows_stand_side_by_side"),
    ),
    Mutation(
        "the paper's table without its factor",
        ROWS,
        'f"{1e5 * error:.1f}"',
        'f"{1e3 * error:.1f}"',
        _tests("evaluation/test_evaluation.py", "test_fid_of_every_row_and_the_paper_s_table"),
    ),
    Mutation("levels are counted the wrong way", MAPPING, '"u": levels - 1 - i,', '"u": i,', ORIGINAL),
    Mutation(
        "keys are taken for queries",
        MAPPING,
        '("query", "to_q", "q", ""),\n        ("key", "to_k", "k", ""),',
        '("query", "to_k", "q", ""),\n        ("key", "to_q", "k", ""),',
        DIFFUSERS,
    ),
    Mutation(
        "original values are taken for keys",
        MAPPING,
        '("key", "to_k", "k", ""),\n        ("value", "to_v", "v", ""),',
        '("key", "to_k", "v", ""),\n        ("value", "to_v", "k", ""),',
        ORIGINAL,
    ),
    Mutation(
        "the middle's blocks change places",
        MAPPING,
        'mid.block1", f"{half}.mid_block.resnets.0"',
        'mid.block1", f"{half}.mid_block.resnets.2"',
        DIFFUSERS,
    ),
    Mutation("kernels keep our layout", MAPPING, "np.moveaxis(array, (-1, -2), (0, 1))", "array", DIFFUSERS),
    Mutation(
        "attention keeps its windows", MAPPING, "torch_shape=w.torch_shape[:2]", "torch_shape=w.torch_shape", DIFFUSERS
    ),
    Mutation("the adaptive weight has no limit", ADVERSARIAL, "jnp.clip(ratio, 0.0, 1e4)", "ratio", TERMS),
    Mutation("the generator's sign", ADVERSARIAL, "return -jnp.mean(fake)", "return jnp.mean(fake)", TERMS),
)
