"""Known-wrong block pools of lesson 16: each overrides a method of the right pool and makes one mistake."""


class Right:
    """The right pool: what follows overrides one thing each."""

    def __init__(self, n, size):
        self.size, self.free, self.holders = size, list(range(n)), [0] * n

    def take(self):
        block = self.free.pop()
        self.holders[block] = 1
        return block

    def share(self, block):
        self.holders[block] += 1

    def give_back(self, table):
        for block in table:
            if self.holders[block] < 1:
                raise ValueError(f"nobody holds block {block}")
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free.append(block)

    def write(self, table, i):
        old = table[i]
        if self.holders[old] == 1:
            return None
        table[i] = self.take()
        self.give_back([old])
        return old, table[i]


class LeavesItAmongTheFree(Right):
    def take(self):
        self.holders[self.free[-1]] = 1
        return self.free[-1]


class CountsNoHolder(Right):
    def take(self):
        return self.free.pop()


class CountsOnTop(Right):                    # of what a block had when it was given back
    def take(self):
        block = self.free.pop()
        self.holders[block] += 1
        return block

    def give_back(self, table):
        for block in table:
            if self.holders[block] < 1:
                raise ValueError
            if self.holders[block] == 1:
                self.free.append(block)
            else:
                self.holders[block] -= 1


class FreesWhatOthersRead(Right):
    def give_back(self, table):
        for block in table:
            if self.holders[block] < 1:
                raise ValueError
            self.holders[block] -= 1
            self.free.append(block)


class ForgetsAllHolders(Right):
    def give_back(self, table):
        for block in table:
            if self.holders[block] < 1:
                raise ValueError
            self.holders[block] = 0
            self.free.append(block)


class NeverFrees(Right):
    def give_back(self, table):
        for block in table:
            if self.holders[block] < 1:
                raise ValueError
            self.holders[block] -= 1


class GivesBackTheFirstAlone(Right):
    def give_back(self, table):
        super().give_back(table[:1])


class WritesWhereOthersRead(Right):
    def write(self, table, i):
        return None


class CopiesAlways(Right):
    def write(self, table, i):
        old = table[i]
        table[i] = self.take()
        self.give_back([old])
        return old, table[i]


class KeepsHoldingTheOld(Right):
    def write(self, table, i):
        old = table[i]
        if self.holders[old] == 1:
            return None
        table[i] = self.take()
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
        if self.holders[old] == 1:
            return None
        self.give_back([old])
        table[i] = self.take()
        return old, table[i]


class TakesBackTwice(Right):
    def give_back(self, table):
        for block in table:
            self.holders[block] = max(0, self.holders[block] - 1)
            if not self.holders[block] and block not in self.free:
                self.free.append(block)


class EmptiesTheTable(Right):
    def give_back(self, table):
        super().give_back(table)
        table.clear()


class SaysValueErrorWhereNoneIsFree(Right):
    def take(self):
        if not self.free:
            raise ValueError("full")
        return super().take()


class SharesForTwo(Right):                   # the first share counts right
    def share(self, block):
        self.holders[block] += 1 if self.holders[block] < 3 else 2
