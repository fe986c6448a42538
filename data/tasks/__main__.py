"""Print every family: distinct prompts, baseline, lengths, and an example of each level.      python -m data.tasks      # 20 s"""
from random import Random
from statistics import mean

from data.tasks import DOMAINS, ENVIRONMENTS, constant_baseline, draw, split_of

DRAWS = 3000      # ours: prompts are counted among so many draws of a level


def characters(messages: list[dict]) -> int: return sum(len(m.get("reasoning") or "") for m in messages if m["role"] == "assistant")


def main() -> None:
    print(f"prompts: different ones among {DRAWS} draws of each level; constant: share that the best single answer gets; characters of reasoning")
    print(f"{'family':24}{'level':>6}{'prompts':>9}{'held out':>9}{'constant':>9}{'answer':>7}{'regular':>8}{'medium':>7}")
    for domain, names in DOMAINS.items():
        print(f"-- {domain}")
        for family in (ENVIRONMENTS[name] for name in names):
            for level in range(family.levels):
                rng = Random(0)
                tasks = list({t.prompt: t for t in (family.sample(level, rng) for _ in range(DRAWS))}.values())
                some = tasks[:300]
                regular, medium = ([family.worked(t, effort, rng) for t in some] for effort in ("regular", "medium"))
                print(f"{family.name if not level else '':24}{level:6}{len(tasks):9,}{sum(split_of(t) == 'held_out' for t in tasks):9,}"
                      f"{constant_baseline(some)[1]:9.2f}{mean(len(m[-1]['content']) for m in regular):7.1f}"
                      f"{mean(map(characters, regular)):8.0f}{mean(map(characters, medium)):7.0f}")
            for level in sorted({0, family.levels // 2, family.levels - 1}):
                task, = draw(family.name, level, 1, 0)
                *turns, last = family.worked(task, "regular", Random(0))
                calls = [f"{c['name']}({', '.join(c['arguments'].values())}) -> {response['content']}" for message, response in zip(turns, turns[1:])
                         for c in message.get("tool_calls", ())]
                print(f"      {task.prompt}  |  {' | '.join([*calls, last['reasoning']])}  |  {last['content']!r}")


if __name__ == "__main__": main()
