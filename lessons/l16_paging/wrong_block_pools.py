"""Known-wrong block pools of lesson 16: each overrides a method of the right pool and makes one mistake."""


class Right:
    """The right pool: what follows overrides one thing each."""

    def __init__(self, n, size):
        self.block_size, self.free_blocks, self.ref_counts = size, list(range(n)), [0] * n

    def allocate(self):
        block = self.free_blocks.pop()
        self.ref_counts[block] = 1
        return block

    def incref(self, block):
        self.ref_counts[block] += 1

    def free(self, table):
        for block in table:
            if self.ref_counts[block] < 1:
                raise ValueError(f"nobody holds block {block}")
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                self.free_blocks.append(block)

    def write(self, table, i):
        old = table[i]
        if self.ref_counts[old] == 1:
            return None
        table[i] = self.allocate()
        self.free([old])
        return old, table[i]


class LeavesItAmongTheFree(Right):
    def allocate(self):
        self.ref_counts[self.free_blocks[-1]] = 1
        return self.free_blocks[-1]


class CountsNoHolder(Right):
    def allocate(self):
        return self.free_blocks.pop()


class CountsOnTop(Right):                    # of what a block had when it was given back
    def allocate(self):
        block = self.free_blocks.pop()
        self.ref_counts[block] += 1
        return block

    def free(self, table):
        for block in table:
            if self.ref_counts[block] < 1:
                raise ValueError
            if self.ref_counts[block] == 1:
                self.free_blocks.append(block)
            else:
                self.ref_counts[block] -= 1


class FreesWhatOthersRead(Right):
    def free(self, table):
        for block in table:
            if self.ref_counts[block] < 1:
                raise ValueError
            self.ref_counts[block] -= 1
            self.free_blocks.append(block)


class ForgetsAllHolders(Right):
    def free(self, table):
        for block in table:
            if self.ref_counts[block] < 1:
                raise ValueError
            self.ref_counts[block] = 0
            self.free_blocks.append(block)


class NeverFrees(Right):
    def free(self, table):
        for block in table:
            if self.ref_counts[block] < 1:
                raise ValueError
            self.ref_counts[block] -= 1


class GivesBackTheFirstAlone(Right):
    def free(self, table):
        super().free(table[:1])


class WritesWhereOthersRead(Right):
    def write(self, table, i):
        return None


class CopiesAlways(Right):
    def write(self, table, i):
        old = table[i]
        table[i] = self.allocate()
        self.free([old])
        return old, table[i]


class KeepsHoldingTheOld(Right):
    def write(self, table, i):
        old = table[i]
        if self.ref_counts[old] == 1:
            return None
        table[i] = self.allocate()
        return old, table[i]


class CopiesTheWrongWay(Right):
    def write(self, table, i):
        copied = super().write(table, i)
        return copied and copied[::-1]


class CopiesTheWholeTable(Right):
    def write(self, table, i):
        copied = super().write(table, i)
        for j in range(len(table)):
            super().write(table, j)
        return copied


class GivesBackBeforeItTakes(Right):
    def write(self, table, i):
        old = table[i]
        if self.ref_counts[old] == 1:
            return None
        self.free([old])
        table[i] = self.allocate()
        return old, table[i]


class TakesBackTwice(Right):
    def free(self, table):
        for block in table:
            self.ref_counts[block] = max(0, self.ref_counts[block] - 1)
            if not self.ref_counts[block] and block not in self.free_blocks:
                self.free_blocks.append(block)


class EmptiesTheTable(Right):
    def free(self, table):
        super().free(table)
        table.clear()


class SaysValueErrorWhereNoneIsFree(Right):
    def allocate(self):
        if not self.free_blocks:
            raise ValueError("full")
        return super().allocate()


class SharesForTwo(Right):                   # the first share counts right
    def incref(self, block):
        self.ref_counts[block] += 1 if self.ref_counts[block] < 3 else 2
