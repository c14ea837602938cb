"""Machine code as nvdisasm prints it: its instructions, and the ways that a warp may take through them."""

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    instructions: list[str]
    after: list[list[int]]  # the instructions that may follow each

    @classmethod
    def of(cls, sass: str) -> "Code":
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in sass.splitlines():
            if match := re.match(r"(\.L_x_\d+):", line):
                labels[match[1]] = len(instructions)
            elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                instructions.append(match[1])
        after = []
        for number, line in enumerate(instructions):
            branch = re.search(r"\b(?:BRA|CALL)\b.*`\((\.L_x_\d+)\)", line)  # sm_80 leaves a loop by a call that doesn't return
            leaves = re.match(r"BRA `|CALL.*\.L_x|EXIT|RET", line) is not None  # without a condition
            following = [] if leaves or number + 1 == len(instructions) else [number + 1]
            after.append(following + ([labels[branch[1]]] if branch else []))
        return cls(instructions, after)

    def opcodes(self, where: Iterable[int]) -> list[str]:
        """Without the predicate before and the operands behind."""
        return [re.sub(r"^@\S+\s+", "", self.instructions[number]).split()[0] for number in where]

    def loops(self) -> list[set[int]]:
        """What each branch back can run again."""
        before: list[list[int]] = [[] for _ in self.after]
        for number, targets in enumerate(self.after):
            for target in targets:
                before[target].append(number)
        back = [(begin, end) for end, targets in enumerate(self.after) for begin in targets if begin <= end]
        return [_reached(begin, self.after) & _reached(end, before, begin) for begin, end in back]

    def shortest(self, start: int, ends: set[int]) -> list[int]:
        """The fewest instructions from start, inclusive, to one of ends, exclusive; none if there is no way."""
        came_from: dict[int, int] = {}
        queue = deque([start])
        while queue:
            number = queue.popleft()
            for target in self.after[number]:
                if target in ends:
                    way = [number]
                    while way[-1] != start:
                        way.append(came_from[way[-1]])
                    return way[::-1]
                if target not in came_from:
                    came_from[target] = number
                    queue.append(target)
        return []

    def without(self, loop: list[int]) -> "Code":
        """Without the branch by which this way around a loop goes back."""
        back = {(number, target) for number, target in zip(loop, loop[1:] + loop[:1], strict=True) if target <= number}
        after = [[target for target in targets if (number, target) not in back] for number, targets in enumerate(self.after)]
        return Code(self.instructions, after)


def _reached(start: int, following: list[list[int]], last: int | None = None) -> set[int]:
    """From start, inclusive, and not past `last`."""
    seen, waiting = {start}, [start]
    while waiting:
        number = waiting.pop()
        new = set() if number == last else set(following[number]) - seen
        seen |= new
        waiting.extend(new)
    return seen


def count(instruction: str, opcodes: Iterable[str]) -> int:
    return sum(re.fullmatch(instruction, opcode.split(".")[0]) is not None for opcode in opcodes)
