"""The tests behind every command that README.md and docs/ show, or the reason why a command has none.

A key stands for every command that begins with its words.  ``tests/unit/test_documented_commands.py`` extracts the
commands and fails for a command that is missing here.
"""

CLI = "tests/unit/test_cli.py::test_each_program_names_itself_as_it_was_started"
BUILT = (
    "tests/integration/test_cache_runs.py::"
    "test_a_build_killed_at_a_random_moment_continues_and_ends_with_the_same_bytes"
)
VERIFIED = "tests/unit/teacher/test_teacher_cache.py::test_a_complete_cache_is_verified_and_described"
TESTS: dict[str, tuple[str, ...]] = {
    "make demo": (
        "tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",
        "tests/integration/test_train.py::test_the_demo_pair_learns",
    ),
    "make test": ("tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",),
    "make test-slow": ("tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",),
    "make setup": ("tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",),
    "make docs": (
        "tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",
        "tests/integration/test_pages.py::test_every_page_of_the_site_fits_and_fetches_nothing_from_elsewhere",
    ),
    "make examples": (
        "tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",
        "tests/integration/test_examples.py",
    ),
    "make faults": (
        "tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",
        "tests/integration/test_faults.py::test_the_suite_writes_its_summary_and_fails_if_anything_was_wrong",
    ),
    "make soak": (
        "tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",
        "tests/integration/test_commands.py::test_a_short_soak_writes_its_report",
    ),
    "make gpu-check": (
        "tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",
        "tests/unit/eval/test_gpu_check.py::test_the_mathematics_pass_on_a_cpu",
    ),
    "make gpu-bench": (
        "tests/unit/test_documented_commands.py::test_make_targets_start_what_they_name",
        "tests/unit/eval/test_gpu_bench.py::test_the_toy_shape_writes_figures_and_a_page",
    ),
    "python -m eval.agreement": ("tests/unit/eval/test_suite.py::test_the_agreement_command_counts_and_names_answers",),
    "python -m eval.faults": (
        "tests/integration/test_faults.py::test_the_suite_writes_its_summary_and_fails_if_anything_was_wrong",
    ),
    "python -m eval.gpu_bench": ("tests/unit/eval/test_gpu_bench.py::test_the_toy_shape_writes_figures_and_a_page",),
    "python -m eval.gpu_check": ("tests/unit/eval/test_gpu_check.py::test_the_mathematics_pass_on_a_cpu",),
    "python -m eval.gradients": (
        "tests/unit/eval/test_gradients.py::test_the_command_measures_every_sampler_against_the_exact_gradient",
    ),
    "python -m eval.gsm8k": (
        "tests/unit/evaluation/test_evaluation.py::test_command_line_on_the_bundled_teacher",
        "tests/unit/eval/test_gsm8k.py::test_an_evaluation_continues_after_a_kill_with_the_same_records",
    ),
    "python -m eval.paired": ("tests/unit/eval/test_paired.py::test_arms_are_recorded_and_compared_again",),
    "python -m eval.performance curves": (
        "tests/unit/eval/test_performance.py::test_steps_and_curves_write_their_keys_and_a_plot",
    ),
    "python -m eval.performance end-to-end": (
        "tests/unit/eval/test_performance.py::test_the_end_to_end_benchmark_writes_its_keys",
    ),
    "python -m eval.performance loss": (
        "tests/unit/eval/test_performance.py::test_the_loss_benchmark_compares_equal_losses_and_writes_its_keys",
    ),
    "python -m eval.performance overlap": (
        "tests/unit/eval/test_performance.py::test_steps_and_curves_write_their_keys_and_a_plot",
    ),
    "python -m eval.soak": ("tests/integration/test_commands.py::test_a_short_soak_writes_its_report",),
    "python -m eval.suite": ("tests/unit/eval/test_suite.py::test_the_suite_on_transformers",),
    "python -m eval.teacher_engines": (
        "tests/integration/test_vllm_teacher.py::test_the_command_compares_both_engines",
    ),
    "python -m eval.trl_baseline": (
        "tests/integration/test_trl_baseline.py::"
        "test_a_stopped_run_resumes_with_the_same_losses_and_writes_a_run_folder",
    ),
    "python -m onpolicy_skd.cache build": (BUILT,),
    "python -m onpolicy_skd.cache info": (VERIFIED,),
    "python -m onpolicy_skd.cache verify": (VERIFIED,),
    "python -m onpolicy_skd.compare": (
        "tests/unit/comparison/test_comparison.py",
        "tests/integration/test_compare_runs.py",
    ),
    "python -m onpolicy_skd.data.demo_pair": (
        "tests/integration/test_commands.py::test_the_bundled_pair_is_trained_from_scratch",
    ),
    "python -m onpolicy_skd.train": ("tests/integration/test_train.py",),
    "skd cache": (CLI, BUILT),
    "skd chat": (CLI, "tests/unit/eval/test_chat_command.py::test_a_run_answers_lines_of_a_pipe_with_its_three_models"),
    "skd compare": (CLI, "tests/integration/test_compare_runs.py"),
    "skd configs": (CLI, "tests/unit/config/test_shipped.py::test_the_list_has_every_config_with_its_comment"),
    "skd eval": (CLI, "tests/unit/test_cli.py::test_arguments_and_exit_code_pass_through"),
    "skd suite": (CLI, "tests/unit/eval/test_suite.py::test_the_suite_on_transformers"),
    "skd train": ("tests/integration/test_wheel.py::test_a_run_by_name_from_an_empty_folder",),
    "skd --help": ("tests/unit/test_cli.py::test_help_lists_every_verb",),
    "ray get-auth-token": (
        "tests/unit/test_cluster_examples.py::test_ray_has_the_commands_that_the_slurm_script_uses",
    ),
    "ray job stop": ("tests/integration/test_job.py::test_job_stop_leaves_a_checkpoint_that_resumes",),
    "ray job submit": ("tests/integration/test_job.py::test_a_submitted_job_runs_to_its_end",),
    "ray start": ("tests/integration/test_job.py::test_a_submitted_job_runs_to_its_end",),
}
# Commands that no test runs, with the reason and what is tested in their place.
OUTSIDE = {
    "docker build": "needs Docker; tests/unit/test_cluster_examples.py lints the files and runs the CPU image's steps",
    "docker run": "needs Docker; the page shows an option of Docker",
    "export": "a builtin of the shell",
    "hf auth login": "needs an account of the hub; tests/integration/test_hub.py covers a run without one",
    "kubectl apply": "needs a cluster; tests/unit/test_cluster_examples.py checks the file against KubeRay's schema",
    "mlflow ui": "needs the package mlflow; tests/unit/report/test_trackers.py reads what a run logs",
    "pip install": "needs a package index; tests/integration/test_wheel.py installs the wheel without dependencies",
    "python -m nltk.downloader": "needs a network; tests/unit/eval/test_suite.py covers a machine without these data",
    "sbatch": "needs a Slurm cluster; tests/unit/test_cluster_examples.py runs the script with stubs",
    "source .venv/bin/activate": "a builtin of the shell; the file comes from Python's venv",
    "wandb sync": "needs an account; tests/integration/test_train.py reads what a run logs offline",
}
