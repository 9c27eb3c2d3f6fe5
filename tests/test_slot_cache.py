"""Every policy agrees with sequences worked out by hand and with a naive implementation of its rule."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_oracle import assert_one_line

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.stores.policies import POLICIES, make_policy
from flashmoe_mlx.stores.slot_cache import Placement, SlotCache

HOT = [5, 3, 8, 1, 13, 2, 21, 0, 34, 7, 11, 4, 30]


def make_cache(name: str, capacity: int) -> SlotCache:
    return SlotCache(capacity, make_policy(name, capacity, HOT if name == "pinned" else ()))


def lost(cache: SlotCache, *request: int) -> list[int]:
    """Return the experts, among 0 to 99, that lose their slots in a request."""
    before = [expert for expert in range(100) if expert in cache]
    cache.place(request)
    return [expert for expert in before if expert not in cache]


# Naive implementations, with experts in lists and the rule in its original words


class Naive:
    """A request uses each of its experts once: first the experts in slots, then all others."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.inside: set[int] = set()

    def request(self, experts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the misses and the evicted experts."""
        misses, evicted = [expert for expert in experts if expert not in self.inside], []
        for expert in experts:
            if expert in self.inside:
                self.use(expert)
        for expert in misses:
            if len(self.inside) == self.capacity:
                victim = self.victim(experts)
                assert victim not in experts
                self.inside.remove(victim)
                evicted.append(victim)
            self.inside.add(expert)
            self.bring(expert)
        return misses, evicted

    def use(self, expert: int) -> None:
        raise NotImplementedError

    def bring(self, expert: int) -> None:
        self.use(expert)

    def victim(self, experts: Sequence[int]) -> int:
        raise NotImplementedError

    def drop(self, expert: int) -> None:
        self.inside.remove(expert)


class NaiveLRU(Naive):
    """A policy that keeps the history of all uses; the victim has the earliest last use."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.history: list[int] = []

    def use(self, expert: int) -> None:
        self.history.append(expert)

    def last_use(self, expert: int) -> int:
        return len(self.history) - 1 - self.history[::-1].index(expert)

    def victim(self, experts: Sequence[int]) -> int:
        return min(self.inside - set(experts), key=self.last_use)

    def drop(self, expert: int) -> None:
        super().drop(expert)
        self.history = [used for used in self.history if used != expert]


class NaiveLFU(NaiveLRU):
    def victim(self, experts: Sequence[int]) -> int:
        by_use = sorted(self.inside, key=lambda expert: (self.history.count(expert), self.last_use(expert)))
        return next(expert for expert in by_use if expert not in experts)


class NaivePinned(NaiveLRU):
    def victim(self, experts: Sequence[int]) -> int:
        pins = HOT[: self.capacity // 2]
        evictable = self.inside - set(experts)
        others = evictable - set(pins)
        return min(others, key=self.last_use) if others else max(evictable, key=pins.index)


class NaiveS3FIFO(Naive):
    """Algorithm 1 of the paper, with its names; the head of a queue is the start of its list."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.s: list[int] = []
        self.m: list[int] = []
        self.g: list[int] = []
        self.freq: dict[int, int] = {}
        self.s_size = max(1, int(0.1 * capacity))
        self.m_size = capacity - self.s_size
        self.evicted: list[int] = []

    def use(self, expert: int) -> None:
        self.freq[expert] = min(self.freq[expert] + 1, 3)

    def bring(self, expert: int) -> None:
        if expert in self.g:
            self.g.remove(expert)
            self.m.insert(0, expert)
        else:
            self.s.insert(0, expert)
        self.freq[expert] = 0

    def victim(self, experts: Sequence[int]) -> int:
        self.evicted = []
        while not self.evicted:
            if len(self.s) >= self.s_size:
                self.evict_s(experts) or self.evict_m(experts)
            else:
                self.evict_m(experts) or self.evict_s(experts)
        assert len(self.evicted) == 1
        return self.evicted[0]

    def evict_s(self, experts: Sequence[int]) -> bool:
        for t in reversed(self.s.copy()):
            if self.freq[t] > 1:
                made_room = len(self.m) >= self.m_size and self.evict_m(experts)
                self.s.remove(t)
                self.m.insert(0, t)
                self.freq[t] = 0
                if made_room:
                    return True
            elif t not in experts:
                self.s.remove(t)
                self.g.insert(0, t)
                del self.g[self.m_size :]
                self.evicted.append(t)
                return True
        return False

    def evict_m(self, experts: Sequence[int]) -> bool:
        while movable := [t for t in self.m if self.freq[t] > 0 or t not in experts]:
            t = movable[-1]
            self.m.remove(t)
            if self.freq[t] > 0:
                self.m.insert(0, t)
                self.freq[t] -= 1
            else:
                self.evicted.append(t)
                return True
        return False

    def drop(self, expert: int) -> None:
        super().drop(expert)
        (self.s if expert in self.s else self.m).remove(expert)


NAIVE: dict[str, Callable[[int], Naive]] = {
    "lru": NaiveLRU,
    "lfu": NaiveLFU,
    "s3fifo": NaiveS3FIFO,
    "pinned": NaivePinned,
}
EXPERTS = 40

each_policy = pytest.mark.parametrize("name", POLICIES)


class Checked:
    """A cache and its naive twin, whose results must agree, and the invariants of all policies."""

    def __init__(self, name: str, capacity: int) -> None:
        self.cache, self.naive = make_cache(name, capacity), NAIVE[name](capacity)
        self.slots: dict[int, int] = {}  # of each expert in the cache
        self.hits = self.misses = self.evictions = self.dropped = self.requests = 0

    def place(self, experts: Sequence[int]) -> None:
        placement = self.cache.place(experts)
        misses, evicted = self.naive.request(experts)
        assert placement.misses == tuple(misses)
        assert placement.evictions == len(evicted)
        assert list(placement.slots) == list(experts)
        for expert in experts:
            if expert not in misses:
                assert placement.slots[expert] == self.slots[expert]
        for expert in evicted:
            del self.slots[expert]
        self.slots |= placement.slots
        self.requests += len(experts)
        self.hits += len(experts) - len(misses)
        self.misses += len(misses)
        self.evictions += len(evicted)
        self.check()

    def drop(self, experts: Sequence[int]) -> None:
        self.cache.drop(experts)
        for expert in experts:
            if expert in self.slots:
                self.naive.drop(expert)
                del self.slots[expert]
                self.dropped += 1
        self.check()

    def check(self) -> None:
        assert {expert for expert in range(EXPERTS) if expert in self.cache} == self.naive.inside == set(self.slots)
        assert len(set(self.slots.values())) == len(self.slots) == len(self.cache) <= self.cache.capacity
        assert all(0 <= slot < self.cache.capacity for slot in self.slots.values())
        assert self.hits + self.misses == self.requests
        assert len(self.cache) == self.misses - self.evictions - self.dropped


@each_policy
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_sequence_agrees_with_the_naive_rule(name: str, data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 6) | st.integers(1, 32))
    some = st.lists(st.integers(0, min(EXPERTS, capacity + 6) - 1), unique=True, max_size=capacity)
    checked = Checked(name, capacity)
    for experts, dropped in data.draw(st.lists(st.tuples(some, st.one_of(st.none(), some)), max_size=40)):
        checked.place(experts)
        if dropped is not None:
            checked.drop(dropped)


@each_policy
@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 10, 20, 39])
@pytest.mark.sampled(8)
def test_long_skewed_sequences_agree_with_the_naive_rule(name: str, capacity: int) -> None:
    random = np.random.default_rng(capacity)
    weights = 1 / np.arange(1, EXPERTS + 1)
    checked = Checked(name, capacity)
    for step in range(1200):
        size = random.integers(1, min(capacity, 10) + 1)
        experts = random.choice(EXPERTS, size, replace=False, p=weights / weights.sum()).tolist()
        checked.place([(expert + step // 200) % EXPERTS for expert in experts])
        if step % 50 == 49:
            checked.drop(experts[:2])
    assert checked.hits > 0
    assert checked.evictions > 0


@each_policy
@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 20])
def test_a_request_may_fill_the_cache(name: str, capacity: int) -> None:
    cache = make_cache(name, capacity)
    for start in (0, capacity, capacity // 2, 0):
        request = list(range(start, start + capacity))
        placement = cache.place(request)
        assert sorted(placement.slots.values()) == list(range(capacity))
        assert all(expert in cache for expert in request)


@each_policy
def test_equal_requests_have_equal_results(name: str) -> None:
    random = np.random.default_rng(0)
    requests = [random.choice(EXPERTS, 4, replace=False).tolist() for _ in range(300)]
    first, second = make_cache(name, 12), make_cache(name, 12)
    assert [first.place(request) for request in requests] == [second.place(request) for request in requests]


@each_policy
def test_refused_requests_change_nothing(name: str) -> None:
    cache, twin = make_cache(name, 3), make_cache(name, 3)
    for request in ([0, 1], [1, 2]):
        assert cache.place(request) == twin.place(request)
    with pytest.raises(ValueError, match="4 experts do not fit into 3 slots"):
        cache.place([6, 7, 8, 9])
    with pytest.raises(ValueError, match="twice"):
        cache.place([1, 9, 1])
    for request in ([4], [0, 5], [1, 2, 4], [0]):
        assert cache.place(request) == twin.place(request)


@each_policy
def test_an_empty_request(name: str) -> None:
    cache = make_cache(name, 2)
    assert cache.place([]) == Placement({}, (), 0)
    cache.drop([])
    assert len(cache) == 0


@each_policy
def test_dropped_experts_free_their_slots(name: str) -> None:
    cache = make_cache(name, 3)
    cache.place([1, 2, 3])
    freed = cache.place([4]).slots[4]
    cache.drop([4, 99])
    assert 4 not in cache
    assert len(cache) == 2
    placement = cache.place([6])
    assert placement == Placement({6: freed}, (6,), 0)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_cache_without_slots_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1 slot"):
        SlotCache(capacity, make_policy("lru", 1))


# LRU


def test_lru_by_hand() -> None:
    cache = make_cache("lru", 3)
    assert cache.place([10, 20]) == Placement({10: 0, 20: 1}, (10, 20), 0)
    assert cache.place([30]) == Placement({30: 2}, (30,), 0)
    assert cache.place([10]) == Placement({10: 0}, (), 0)
    assert cache.place([40]) == Placement({40: 1}, (40,), 1)  # 20 was used before 30 and 10
    assert cache.place([20, 10]) == Placement({20: 2, 10: 0}, (20,), 1)  # 30 is the oldest
    assert lost(cache, 50, 60) == [10, 40]  # the hits of a request count before its misses
    assert 20 in cache


@pytest.mark.parametrize("k", [1, 4])
def test_lru_never_hits_on_a_cycle_longer_than_the_cache(k: int) -> None:
    capacity = 3 * k
    cache = make_cache("lru", capacity)
    cycle = [list(range(first, first + k)) for first in range(0, capacity + k, k)]
    assert all(len(cache.place(request).misses) == k for request in 10 * cycle)


# LFU


def test_lfu_by_hand() -> None:
    cache = make_cache("lfu", 2)
    cache.place([1])
    cache.place([1])
    cache.place([2])
    assert lost(cache, 3) == [2]  # 1 use against 2
    assert lost(cache, 2) == [3]  # 1 use against 2
    assert lost(cache, 3) == [1]  # 2 uses each, including the use of 2 before its eviction; 2 was used later
    assert lost(cache, 4) == [2]  # 2 uses each; 3 was used later
    assert lost(cache, 2) == [4]


def test_lfu_skips_the_current_request() -> None:
    cache = make_cache("lfu", 2)
    for request in ([1], [2], [2], [2]):
        cache.place(request)
    assert lost(cache, 1, 3) == [2]


def test_lfu_forgets_the_uses_of_dropped_experts() -> None:
    cache = make_cache("lfu", 2)
    for request in ([1], [1], [1], [2], [2]):
        cache.place(request)
    cache.drop([1])
    cache.place([1])
    assert lost(cache, 3) == [1]


# S3-FIFO


def test_s3fifo_by_hand() -> None:
    cache = make_cache("s3fifo", 4)  # 1 for the small queue S, 3 for the main queue M and the ghosts G
    for request in ([1], [2], [3], [4], [1], [2], [1]):
        cache.place(request)
    # Oldest first: S = 1 (2 hits), 2 (1 hit), 3, 4
    assert lost(cache, 5) == [2]  # 1 goes to M. S = 3, 4, 5; M = 1; G = 2
    assert lost(cache, 6) == [3]  # S = 4, 5, 6; G = 2, 3
    assert lost(cache, 2) == [4]  # from the ghosts. S = 5, 6; M = 1, 2; G = 3, 4
    assert lost(cache, 7) == [5]  # S = 6, 7; G = 3, 4, 5
    assert lost(cache, 3) == [6]  # which takes the place of the ghost 3. S = 7, 3; G = 4, 5, 6
    assert lost(cache, 5) == [7]  # from the ghosts. S = 3; M = 1, 2, 5; G = 4, 6, 7
    for request in ([3], [3]):
        cache.place(request)
    assert lost(cache, 8) == [1]  # 3 goes to M, which is full; the hits of 1 ended in S. S = 8; M = 2, 5, 3
    for request in ([2], [8], [8]):
        cache.place(request)
    assert lost(cache, 9) == [5]  # 8 goes to M, where 2 goes around. S = 9; M = 3, 2, 8
    assert lost(cache, 10) == [9]
    assert [expert for expert in range(12) if expert in cache] == [2, 3, 8, 10]


def test_s3fifo_skips_the_current_request() -> None:
    cache = make_cache("s3fifo", 3)
    for request in ([1], [2], [3]):
        cache.place(request)
    assert lost(cache, 1, 4) == [2]
    assert lost(cache, 5) == [1]  # it was skipped but stayed the oldest; one hit does not keep it


def test_s3fifo_counts_at_most_three_hits() -> None:
    cache = make_cache("s3fifo", 4)
    for request in ([1, 2], [1, 2], [1, 2], [3, 4]):
        cache.place(request)
    assert lost(cache, 5) == [3]  # S = 4, 5; M = 1, 2
    for request in 3 * [[1, 2]] + 100 * [[1]]:
        cache.place(request)
    assert lost(cache, 4, 5, 6) == [1]  # S is in the request; in M each expert goes around three times


def test_s3fifo_resists_a_scan_and_lru_does_not() -> None:
    hits = {}
    for name in ("lru", "s3fifo"):
        cache = make_cache(name, 20)
        used_again = list(range(10))
        for _ in range(3):
            cache.place(used_again)
        for once in range(100, 200, 5):
            cache.place(range(once, once + 5))
        hits[name] = 10 - len(cache.place(used_again).misses)
    assert hits == {"lru": 0, "s3fifo": 10}


# Pinned


def test_pinned_by_hand() -> None:
    cache = SlotCache(4, make_policy("pinned", 4, [7, 8, 9]))  # half of the slots: 7 and 8 are pinned
    cache.place([8, 7, 9, 1])
    assert lost(cache, 2) == [9]
    assert lost(cache, 3) == [1]
    assert lost(cache, 3, 2, 4) == [8]  # no unpinned expert is left: the coldest pinned expert
    assert lost(cache, 8) == [3]  # pinned again
    assert lost(cache, 5, 6) == [2, 4]
    assert lost(cache, 1, 2, 3, 4) == [5, 6, 7, 8]


def test_pinned_experts_reserve_no_slots() -> None:
    cache = SlotCache(4, make_policy("pinned", 4, [7, 8]))
    cache.place([1, 2, 3, 4])
    assert len(cache) == 4
    assert lost(cache, 7) == [1]
    assert lost(cache, 1) == [2]


@given(requests=st.lists(st.lists(st.integers(0, 39), unique=True, max_size=5), max_size=60))
def test_pinned_experts_stay_while_requests_fit_beside_them(requests: list[list[int]]) -> None:
    cache = make_cache("pinned", 10)
    seen: set[int] = set()
    for request in requests:
        cache.place(request)
        seen |= set(request) & set(HOT[:5])
        assert all(expert in cache for expert in seen)


# Names


@pytest.mark.parametrize("name", ["nosuch", "", "LRU"])
def test_an_unknown_policy_lists_the_known_policies(name: str) -> None:
    with pytest.raises(InputError) as caught:
        make_policy(name, 4)
    assert caught.value.code == "unknown_policy"
    assert all(policy in str(caught.value) for policy in POLICIES)
    assert_one_line(caught.value)


def test_pinned_without_hot_experts_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        make_policy("pinned", 4)
    assert caught.value.code == "policy_without_trace"
    assert_one_line(caught.value)


def test_the_policies_cannot_be_changed() -> None:
    policies: Any = POLICIES
    with pytest.raises(TypeError):
        policies["lru"] = policies["lfu"]
