"""An experiment: what a config describes, made live, step by step or all at once.

    experiment = jaxreset.Experiment(config, task=…, rule=…, callbacks=[…])   # or the config alone
    record = experiment.step()                                                # or by hand:
    groups = experiment.collect(experiment.prompts())
    metrics = experiment.learn(groups)

Everything that can be refused is refused when it is made; programs are compiled when they are first
needed, so a bad config costs seconds. Nothing is written to disk: that is `loop.train`'s part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreset.config import Config
from jaxreset.config_names import find_callback
from jaxreset.errors import ConfigError
from jaxreset.groups import Group, set_advantages
from jaxreset.learning.credit import credit_steps
from jaxreset.learning.form import find_advantage
from jaxreset.learning.learner import Learner
from jaxreset.models.adapters import trained
from jaxreset.models.policy import Policy
from jaxreset.parallel import data_shards
from jaxreset.parallel.compiling import Compile, SideBySide
from jaxreset.planning.shapes import choose_mesh, run_shapes
from jaxreset.resets.collect import Collected, Collector
from jaxreset.run.compiles import LARGE_PROCESS, trim
from jaxreset.run.evaluate import PHASE, SetResponses, measure, named, respond
from jaxreset.run.lessons import Lessons, make_lessons
from jaxreset.run.objects import with_objects
from jaxreset.run.parts import adapted, make_localizer, read_or_make_problems, starting_policy
from jaxreset.run.warm_start import OnStep, warm_start
from jaxreset.sampling.rounds import StopRules, Stream
from jaxreset.sampling.sampler import Sampler
from jaxreset.tasks.pipeline import Prompt, PromptSource, encode_prompts, fit_prompts, steps_writer
from jaxreset.tasks.scoring import score_together

Record = dict[str, Any]


class Experiment:
    """What a config describes, ready to sample and to train.

    Args:
      config: from `load_config`.
      **objects: in place of what the config names: `task`, `reward` (a function, or several by name, each a
        function or a pair of one and its weight), `rule`, `objective`, `advantage`, `form`, `callbacks`.

    Attributes:
      config: resolved, the objects named in it by their import paths.
      objective, task, asking, sampler, collector: what it says.
      shapes: that are compiled.
      problems: what is trained on, and sets that are held out; those with overlong prompts left out.
      score: rewards of (problem, response) pairs.
      callbacks: functions of a step's record and this experiment.
      stopped: why a callback ended the training; None: none did.

    Raises:
      ConfigError: anything missing, unreadable or that doesn't fit together; names what to change.
    """

    def __init__(self, config: Config, **objects: Any):
        try:
            self._make(with_objects(config, **objects))
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(str(error)) from error

    def _make(self, config: Config) -> None:
        self.config = config
        self.objective = objective = config.make_objective()
        mesh = choose_mesh(config)
        self.shapes = shapes = run_shapes(
            config, objective, shards=data_shards(mesh), tensor=mesh.shape["tensor"]
        )
        self.task = task = config.task.make()
        self.rewards = config.task.make_rewards(task)
        self.score = task.score if self.rewards is None else self.rewards.score
        self.advantage = find_advantage(config.loss.advantage or "std")
        self.form = config.loss.make()
        self.callbacks = [find_callback(name) for name in config.run.callbacks]
        self.stopped: str | None = None
        problems = read_or_make_problems(config, task)
        self.mesh = mesh if mesh.size > 1 else None
        policy = self._start = starting_policy(config, self.mesh)
        self._learner: Learner | None = None

        self.asking = asking = config.task.make_asking(task, policy.tokenizer)
        refuse = config.data.overlong == "refuse"
        limit = config.sampling.max_prompt_tokens
        train, overlong = fit_prompts(problems.train, asking, limit, refuse=refuse)
        test = {
            name: fit_prompts(held_out, asking, limit, refuse=refuse)[0]
            for name, held_out in problems.test.items()
        }
        self.problems, self.overlong = problems._replace(train=train, test=test), overlong
        self.source = PromptSource(train, asking, seed=config.seed, weights=problems.weights)

        s = config.sampling
        self.sampler = Sampler.for_policy(
            policy,
            StopRules(s.max_response_tokens, s.max_steps, s.max_step_tokens),
            delimiter=task.delimiter,
            answer_marker=task.answer_marker,
            stop_strings=config.task.stop,
            shapes=[*shapes.base, shapes.evaluate, *shapes.written],
            forks=shapes.forks,
            slots=s.slots,
            hold_cache=s.hold_cache,
            mesh=self.mesh,
        )
        self.collector = Collector(
            objective,
            self.sampler,
            task,
            policy.without_params().decode,
            None
            if shapes.localize is None
            else make_localizer(config, shapes, asking, policy, self.mesh),
            draw={"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k},
            score=self.score,
            failed_below=config.task.threshold,
            write=steps_writer(
                asking,
                max_response=s.max_response_tokens,
                max_steps=s.max_steps,
                room=s.max_step_tokens,
            ),
        )

    @property
    def start_policy(self) -> Policy:
        """What a warm start starts from: without adapters, and once it is trained without parameters."""
        return self._start

    @property
    def learner(self) -> Learner:
        """What trains; made when it is first asked for, after the warm start that the config asks for."""
        if self._learner is None:
            self.begin(self.adapted(self.warm_started()))
        assert self._learner is not None
        return self._learner

    @property
    def policy(self) -> Policy:
        """The policy with its current parameters, valid until the next update."""
        return self.learner.policy

    @property
    def steps_done(self) -> int:
        """Training steps so far."""
        return 0 if self._learner is None else self._learner.progress.step

    def decode(self, tokens: np.ndarray) -> str:
        """Token ids -> text; see `Policy.decode`."""
        return self.collector.decode(tokens)

    @cached_property
    def lessons(self) -> Lessons:
        """What the warm start learns from; read when it is first asked for.

        Raises:
          ConfigError: something is wrong with it.
        """
        try:
            return make_lessons(self.config, self.asking, self.problems.train, self._start.eos_ids)
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(str(error)) from error

    def warm_started(self, on_step: OnStep = lambda record: None) -> Policy:
        """The start policy after the supervised steps of `warm_start`, if the config has any.

        A fresh one has no adapters yet; another one has them, and they are what was trained.
        """
        config = self.config
        if not config.warm_start.steps:
            return self._start
        fresh = config.model.path is None
        return warm_start(
            self._start if fresh else self.adapted(self._start),
            self.lessons,
            config,
            on_step=on_step,
            interrupt=self.collector.interrupt,
            mesh=self.mesh,
        )

    def adapted(self, policy: Policy) -> Policy:
        """The policy with the adapters that the config asks for; itself where it has them."""
        return adapted(self.config, policy, self.mesh)

    def begin(
        self,
        policy: Policy,
        on_nonfinite: Callable[[int, list[Group]], None] = lambda step, groups: None,
    ) -> Learner:
        """Trains from this policy on; its parameters are taken over, and those of `start_policy` let go."""
        keep = self.config.loss.kl > 0
        self._learner = Learner(
            self.config.make_learner_settings(),
            policy,
            self.form,
            self.shapes.pack,
            self.mesh,
            on_nonfinite,
            reference=jax.tree.map(jnp.copy, trained(policy.params)[0]) if keep else None,
        )
        self._start = self._start.without_params()
        return self._learner

    def compile(self) -> None:
        """Compiles all that steps and evaluations will need; without it each does when first needed."""
        with SideBySide() as compiled:
            self.compile_sampling(self.policy, compiled)
            self.learner.compile(compiled)
        self.set_advantages([])  # padded, so that it compiles once

    def compile_sampling(self, policy: Policy, compiled: Compile | None = None) -> None:
        """Compiles all that sampling, asking and evaluating will need; see `Sampler.compile`."""
        self.sampler.compile(policy, compiled)
        if self.collector.localizer is not None:
            self.collector.localizer.compile(policy, compiled)

    def prompts(self, count: int | None = None) -> list[Prompt]:
        """The next prompts of the shuffled source; None: as many as a step takes."""
        return self.source.next(self.config.train.prompts_per_step if count is None else count)

    def test_prompts(self, name: str | None = None) -> list[Prompt]:
        """The held-out prompts of a set, None: of the main one; their numbers start at 0."""
        sets = self.problems.test
        test = sets[next(iter(sets)) if name is None else name]
        problems = [test[i] for i in range(len(test))]
        return encode_prompts(problems, self.asking, range(len(test)))

    def collect(self, prompts: Sequence[Prompt]) -> Collected:
        """Draws the groups of the next step, scores them, resets; advantages are in them.

        Called again before `learn`, with the same prompts, it draws the same.

        Raises:
          RunError: the verifier failed on every response.
        """
        step = self.learner.progress.step + 1
        collected = self.collector.collect(
            self.learner.policy, prompts, seed=self.config.seed, step=step
        )
        self.set_advantages(collected.groups)
        return collected

    def set_advantages(self, groups: Sequence[Group]) -> None:
        """Fills in the advantages that the config's section `loss` asks for."""
        loss = self.config.loss
        cut: dict[str, Any] = {
            "cut_penalty": loss.overlong_penalty,
            "mask_cut": loss.overlong == "mask",
        }
        set_advantages(groups, scale=self.advantage, size=self.shapes.sets, **cut)
        if loss.credit == "steps":
            credit_steps(groups, **cut)

    def learn(self, groups: Iterable[Group]) -> dict[str, float]:
        """Learns from groups that have advantages, which ends the step; returns metrics of the update.

        Raises:
          RunError: too many gradients in a row weren't finite.
        """
        groups = list(groups)
        metrics = self.learner.learn(groups, 1 + max((g.prompt for g in groups), default=-1))
        progress = self.learner.progress
        self.learner.progress = progress._replace(
            step=progress.step + 1, data_position=self.source.position
        )
        return metrics

    def step(self) -> Record:
        """One training step: rollouts, advantages, update. Returns its metrics; callbacks aren't called."""
        return self.step_with_trees()[0]

    def step_with_trees(self) -> tuple[Record, list[Record]]:
        """As `step`, with the step's reset trees."""
        learner = self.learner
        start = time.perf_counter()
        collected = self.collect(self.prompts())
        sampled = time.perf_counter()
        trim(LARGE_PROCESS)
        learnt = self.learn(collected)
        end = time.perf_counter()
        record = {
            "step": learner.progress.step,
            "seconds": end - start,
            **collected.metrics,
            **learnt,
            "data/position": self.source.position,
            "data/overlong_dropped": self.overlong.dropped,
            "data/ungradable_dropped": self.problems.ungradable,
            "optimizer_version": learner.progress.version,
            "time/sample": sampled - start,
            "time/update": end - sampled,
            "time/tokens_per_second": collected.metrics["tokens_sampled"] / (end - start),
        }
        return record, collected.trees

    def evaluate(
        self,
        policy: Policy | None = None,
        step: int | None = None,
        see: Callable[[SetResponses], None] = lambda responses: None,
    ) -> dict[str, float]:
        """Metrics of the held-out sets, sampled and greedy, each response drawn from the prompt alone.

        The first set's are named `eval/accuracy` and so on, those of others `eval/NAME/accuracy`; what each
        says is in docs/evaluation.md. Training before and after it draws the same as without it.

        Args:
          policy: None: the current one.
          step: that its random numbers are named by; None: the last one.
          see: is given each set's responses once they are scored.
        """
        e, step = self.config.eval, self.steps_done if step is None else step
        drawing: dict[str, Any] = {"temperature": e.temperature, "top_p": e.top_p, "top_k": e.top_k}
        sets = {}
        for n, name in enumerate(self.problems.test):
            draw = partial(
                respond,
                self.policy if policy is None else policy,
                self.test_prompts(name),
                self.sampler,
                self.score,
                self.decode,
                marker=self.task.answer_marker,
                batch=e.batch,
                stream=Stream(self.config.seed, step, PHASE + n),
                failed_below=self.config.task.threshold,
                interrupt=self.collector.interrupt,
                keep_errors=self.collector.keep_errors,
            )
            sampled = draw(samples=e.samples, **drawing)
            responses = SetResponses(name, sampled, greedy=draw(temperature=0.0))
            see(responses)
            sets[name] = measure(responses, self.task.answer)
        return named(sets)

    def scorer(
        self, prompts: Sequence[Prompt]
    ) -> Callable[[Sequence[int], Sequence[np.ndarray]], np.ndarray]:
        """Scores responses by the number of their prompt, as `step_values` wants it."""

        def score(groups: Sequence[int], responses: Sequence[np.ndarray]) -> np.ndarray:
            problems = [prompts[g].problem for g in groups]
            texts = map(self.decode, responses)
            items = list(zip(problems, texts, strict=True))
            return score_together(self.score, items).rewards

        return score

    def stop(self, reason: str) -> None:
        """For callbacks: the run ends after this step, as if it were the last."""
        self.stopped = reason

    def close(self) -> None:
        """Ends the processes that check answers."""
        self.task.close()
        if self.rewards is not None:
            self.rewards.close()

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
