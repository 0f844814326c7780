"""The actors of one run by role: started in one placement group, called, replaced and killed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import ray

from actors.cluster import wait_ready
from actors.faults import Log, Place, get_answers
from actors.learner_actor import LearnerActor
from actors.placement import Placement, Resources
from actors.rollout_actor import RolloutGroup
from actors.teacher_actor import TeacherActor
from onpolicy_skd.config.schema import Settings


class ActorGroups:
    """The learner's ranks, the teachers and the rollout engines.

    The constructor starts the engines, ``start_trainers`` the other roles.
    """

    def __init__(
        self, settings: Settings, resources: Resources, vocabulary: int, pad_id: int, steps: int, log: Log
    ) -> None:
        self.settings = settings
        self.log = log
        self._engines_in_learner = settings.rollout.placement == "learner"
        self._placement = placement = Placement(resources)
        self._places: dict[Any, Place] = {}
        self._joined = False  # True once the learner's ranks have formed their process group
        self._resources = resources
        learner, teacher, rollout = resources.roles
        teacher_settings = teacher.on_device(settings)

        def start_teacher(number: int) -> Any:
            actor = TeacherActor.options(**placement.options(teacher, number))
            if not settings.teachers:
                return actor.remote(teacher_settings, vocabulary, pad_id, number, teacher.count)
            name, index = self._teacher_names[number]
            named_settings, count = teacher_settings.of_teacher(name), settings.teachers[name].actors
            return actor.remote(named_settings, vocabulary, pad_id, index, count, name, teacher.count)

        self._teacher_names = [(name, i) for name, cfg in settings.teachers.items() for i in range(cfg.actors)]
        self._start_teacher = start_teacher
        self._start_rank = lambda rank: LearnerActor.options(**placement.options(learner, rank)).remote(
            learner.on_device(settings), vocabulary, steps, self.teachers_by_name, rank
        )
        self.learner: list[Any] = []  # one actor for each rank
        self.teachers: list[Any] = []
        self.rollouts = RolloutGroup(
            settings.student, rollout.on_device(settings), lambda n: placement.options(rollout, n), rollout.count, log
        )

    def start_trainers(self) -> None:
        """Start teachers and learner."""
        self.teachers = [self._start_teacher(number) for number in range(self._resources.teacher.count)]
        self._start_learner()

    def _start_learner(self) -> None:
        self.learner = [self._start_rank(rank) for rank in range(self._resources.learner.count)]
        self._joined = False
        if self._engines_in_learner:
            self.rollouts.actors = self.learner

    @property
    def teachers_by_name(self) -> list[Any] | dict[str, list[Any]]:
        """The actors of the only teacher, or lists of actors by the names of several teachers."""
        if not self._teacher_names:
            return self.teachers
        groups: dict[str, list[Any]] = {name: [] for name in self.settings.teachers}
        for (name, _), actor in zip(self._teacher_names, self.teachers, strict=True):
            groups[name].append(actor)
        return groups

    @property
    def shares_gpus(self) -> bool:
        """True if an engine's GPU has other actors too."""
        rollout = self._resources.rollout
        return rollout.gpus > 0 and (self._resources.colocated or rollout.gpus < 1)

    @property
    def engines(self) -> list[Any]:
        """Rollout engines in separate processes; none with ``rollout.placement=learner``."""
        return [] if self._engines_in_learner else self.rollouts.actors

    @property
    def by_role(self) -> dict[str, list[Any]]:
        # Teachers first: a learner that waits for a teacher fails with it, and the teacher's error is the cause.
        return {"teacher": self.teachers, "rollout": self.engines, "learner": self.learner}

    @property
    def all(self) -> list[Any]:
        return [actor for actors in self.by_role.values() for actor in actors]

    def role(self, actor: Any) -> str:
        return next(role for role, actors in self.by_role.items() if actor in actors)

    def place(self, actor: Any) -> Place | None:
        return self._places.get(actor)

    def gpu_of(self, actor: Any) -> str | None:
        """Return the UUID of the GPU of ``actor``; None without one, or with several."""
        where = self.place(actor)
        return where.gpu if where else None

    def with_id(self, actor_id: str | None) -> Any:
        """Return the actor with Ray's ``actor_id``; None if it never became ready or belongs to another run."""
        return next((a for a in self.all if (where := self.place(a)) and where.actor_id == actor_id), None)

    def wait_engines(self, log: Log) -> None:
        """Block until the cluster has room and every engine is up.  Raises what ``wait_ready`` raises."""
        self._placement.wait(log)
        wait_ready({"rollout": self.engines}, log, self.timeout_s())

    def wait_ready(self, log: Log) -> None:
        """Block until the cluster has room, however long that takes, and every actor is up.

        Raises what an actor's constructor raised, and GetTimeoutError if starting the actors takes longer than
        ``faults.deadline_minutes``.
        """
        self._placement.wait(log)
        self._places = {}
        # Engines last: the learner's error about a model that cannot be loaded is clearer.
        ordered = {role: self.by_role[role] for role in ("teacher", "learner", "rollout")}
        wait_ready(ordered, log, self.timeout_s(), self._places)
        if len(self.learner) > 1 and not self._joined:
            address = ray.get(self.learner[0].rendezvous_address.remote())
            self.call_ranks(lambda rank: rank.join_ranks.remote(address))
            self._joined = True

    def call_ranks(self, call: Callable[[Any], ray.ObjectRef], trajectories: int = 0) -> Any:
        """Make ``call`` on every rank of the learner and return rank 0's answer; raise as soon as any rank fails.

        The timeout grows with ``trajectories``, the number that the call works on.
        """
        return self.get([call(rank) for rank in self.learner], "learner", trajectories)[0]

    def get(self, refs: Any, role: str, trajectories: int = 0) -> Any:
        """Return the answers of ``role`` to the calls ``refs``, which work on that many ``trajectories``.

        Raises GetTimeoutError after a time that grows with their number.
        """
        return get_answers(refs, role, self.timeout_s(trajectories), self.log)

    def timeout_s(self, trajectories: int = 0) -> float:
        return self.settings.faults.timeout_s(trajectories / self.settings.rollouts_per_step)

    def replace(self, failed: Collection[Any]) -> None:
        """Start new actors in place of the ``failed`` ones, which must have been killed."""
        new_learner = self.learner[0] in failed
        if any(teacher in failed for teacher in self.teachers):
            self.teachers = [self._start_teacher(n) if t in failed else t for n, t in enumerate(self.teachers)]
            if not new_learner:
                for rank in self.learner:
                    rank.use_teachers.remote(self.teachers_by_name)
        for number, engine in enumerate(self.engines):
            if engine in failed:
                self.rollouts.restart(number)
        if new_learner:
            self._start_learner()

    def close(self) -> None:
        for actor in self.all:
            ray.kill(actor)
        self._placement.remove()
