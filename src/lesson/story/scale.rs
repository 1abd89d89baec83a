//! Scale: the same machine, bigger and smaller.

use super::GOLDEN;
use crate::lesson::{Chapter, Claim, Notes, Question, Step, run};

pub const CHAPTER: Chapter = Chapter {
    name: "scale",
    title: "Vertical scaling",
    aim: "Scale a machine up and shrink it down again, and know what can follow and what cannot.",
    strike: &[],
    steps: &[
        Step {
            name: "load",
            title: "Too many visitors",
            story: "Anna's kitten is in the news. Four visitors at a time ask her machine, which has one vCPU, for work.",
            watch: "Requests per second. Keep the number.",
            stage: GOLDEN,
            needs: &["anna@golden"],
            acts: &[
                run("catnap exec anna -- nproc").named("cpus"),
                run("catnap load anna --seconds 4 --connections 4 --path '/work?n=300000' --json").named("small"),
            ],
            claims: &[
                Claim {
                    says: "With {cpus.text} vCPU it answered {small.requests_per_second} requests per second.",
                    holds: |f| Some(f.text("cpus.text")? == "1" && f.number("small.requests_per_second")? > 0.0),
                },
                Claim { says: "{small.errors} of them went wrong.", holds: |f| Some(f.number("small.errors")? == 0.0) },
            ],
            figure: "{small.requests_per_second} requests per second",
            notes: Notes {
                minutes: 1,
                say: "The work is arithmetic, so only more CPU helps. Ask what would help if it waited for a disk.",
                wrong: "Numbers differ between laptops, and with what else runs on them. Only compare your own.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "bigger",
            title: "Nap, and wake bigger",
            story: "Anna does not boot a bigger machine. Hers takes a nap, and wakes with two vCPUs and twice the memory.",
            watch: "The counter and the visits on the page: are they unbroken?",
            stage: GOLDEN,
            needs: &["anna@golden"],
            cast: &["anna"],
            makes: &["anna@small"],
            acts: &[
                run("catnap snapshot create anna@small --json").named("nap"),
                run("catnap restore anna@small --replace --no-safety --cpus 2 --memory 512M --json")
                    .named("wake")
                    .watching("anna"),
            ],
            claims: &[
                Claim {
                    says: "It had {watch.first.cpus} vCPU and has {watch.last.cpus}; its memory went from \
                           {watch.first.memory_bytes:mib} to {watch.last.memory_bytes:mib}.",
                    holds: |f| {
                        let cpus = f.number("watch.first.cpus")? == 1.0 && f.number("watch.last.cpus")? == 2.0;
                        Some(
                            cpus && f.number("watch.last.memory_bytes")?
                                > 1.6 * f.number("watch.first.memory_bytes")?,
                        )
                    },
                },
                Claim {
                    says: "Nothing was booted: the run is the same, and its {watch.last.visits} visits are not forgotten.",
                    holds: |f| {
                        let same = f.same("watch.first.nonce", "watch.last.nonce")?;
                        Some(
                            same && f.same("watch.first.boot_id", "watch.last.boot_id")?
                                && f.same("watch.first.visits", "watch.last.visits")?,
                        )
                    },
                },
                Claim {
                    says: "It was awake in its new size {wake.ready_us:ms} after the command began.",
                    holds: |f| Some(f.get("wake.resumed")?.as_bool()? && f.number("wake.ready_us")? > 0.0),
                },
            ],
            figure: "{wake.ready_us:ms} to another size",
            ask: Some(Question {
                text: "The counter on the page after the nap …",
                answers: [
                    "begins at 0: it is a new machine",
                    "goes on from where the snapshot found it",
                    "has counted through the nap as well",
                    "is wrong, and cannot be told",
                    "is twice as fast, with two vCPUs",
                ],
                best: 'B',
                because: "The program that counts was asleep with everything else. It knows nothing of the time between; \
                          only the clock on the wall was put right.",
            }),
            notes: Notes {
                minutes: 3,
                say: "Most clouds make you stop, change the flavour, and boot. There the counter would begin at 0, and \
                      whatever was in memory would be gone. Here the machine had room reserved from the start: its \
                      envelope.",
                wrong: "A size outside the envelope is refused, and the envelope is named. It was fixed at the first boot.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "more",
            title: "The same crowd again",
            story: "The same four visitors, the same work, twice the vCPUs.",
            watch: "Requests per second. Is it twice as many?",
            stage: &["catnap restore anna@small -p {port}:80 --cpus 2 --memory 512M"],
            needs: &["anna@small"],
            cast: &["anna"],
            acts: &[run("catnap load anna --seconds 4 --connections 4 --path '/work?n=300000' --json")
                .named("big")
                .minding_the_host()],
            tries: 3,
            claims: &[
                Claim {
                    says: "{big.requests_per_second} requests per second, and {small.requests_per_second} before. (Just \
                           now, two programs on this host get {host.speed} times the CPU of one; without a second CPU to \
                           spare, nothing can be won.)",
                    holds: |f| {
                        let won = f.number("big.requests_per_second")? > 1.1 * f.number("small.requests_per_second")?;
                        Some(won || f.number("host.speed")? < 1.5)
                    },
                },
                Claim { says: "{big.errors} of them went wrong.", holds: |f| Some(f.number("big.errors")? == 0.0) },
            ],
            figure: "{big.requests_per_second} requests per second",
            ask: Some(Question {
                text: "Why is it not exactly twice as many?",
                answers: [
                    "Two vCPUs share one memory",
                    "The host's CPUs are shared with others, and with the one who asks",
                    "Not all of the work can be done side by side",
                    "The network in between costs the same as before",
                    "All of these, a little",
                ],
                best: 'E',
                because: "Vertical scaling buys less and less. At some point a second machine is cheaper than a bigger one.",
            }),
            notes: Notes {
                minutes: 2,
                say: "Have two groups compare their factors. A laptop with two cores has none left for the visitors.",
                wrong: "On a host with one free CPU nothing is won. That is a result too; say why.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "shrink",
            title: "And smaller again",
            story: "The news has moved on, and Anna pays by the hour. She shrinks the machine while it runs.",
            watch: "The sizes on the page. Nobody's connection breaks.",
            stage: &["catnap restore anna@small -p {port}:80 --cpus 2 --memory 512M"],
            needs: &["anna@small"],
            cast: &["anna"],
            acts: &[run("catnap resize anna --cpus 1 --memory 256M --json").named("resize").watching("anna")],
            claims: &[
                Claim {
                    says: "{watch.first.cpus} vCPUs became {watch.last.cpus}, {watch.first.memory_bytes:mib} became \
                           {watch.last.memory_bytes:mib}.",
                    holds: |f| {
                        let cpus = f.number("watch.first.cpus")? == 2.0 && f.number("watch.last.cpus")? == 1.0;
                        Some(cpus && f.number("watch.last.memory_bytes")? < f.number("watch.first.memory_bytes")?)
                    },
                },
                Claim {
                    says: "The counter counted {watch.ticks} times meanwhile, and never back.",
                    holds: |f| Some(f.number("watch.ticks")? > 0.0 && f.number("watch.setbacks")? == 0.0),
                },
            ],
            figure: "back to {watch.last.memory_bytes:mib}",
            notes: Notes {
                minutes: 1,
                say: "Shrinking asks the guest to give something back, and it may refuse: memory that its programs use \
                      stays. A machine that runs cannot go below what it booted with.",
                wrong: "It keeps more than it was asked for: then that is said, and the exit code is 4.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "ratchet",
            title: "The size ratchet of disks",
            story: "Disks grow as easily. Bella, made from the same snapshot, gets a disk of 3 GiB in place of 2. Then Anna \
                    wants it small again.",
            watch: "The last command, and what it says.",
            stage: &[],
            needs: &["anna@small"],
            makes: &["bella@big"],
            acts: &[
                run("catnap restore anna@small --name bella --disk-size 3G -p {port2}:80"),
                run("catnap exec bella -- df -m /").named("df"),
                run("catnap snapshot create bella@big"),
                run("catnap restore bella@big --name smaller --disk-size 2G").exits(4).named("refused"),
                run("catnap rm --force bella"),
            ],
            claims: &[
                Claim {
                    says: "The filesystem grew with the disk, while it was mounted.",
                    holds: |f| {
                        let row = f.text("df.text")?.lines().last()?;
                        let size: f64 = row.split_whitespace().nth(1)?.parse().ok()?;
                        Some(size > 2500.0)
                    },
                },
                Claim {
                    says: "Smaller is refused, with exit code {refused.code}: a disk only grows.",
                    holds: |f| Some(f.text("refused.error")?.contains("a disk only grows")),
                },
            ],
            ask: Some(Question {
                text: "How does Anna get back to a small disk?",
                answers: [
                    "catnap resize",
                    "She waits until it is empty",
                    "She deletes files until it fits",
                    "She makes a new, small machine and copies her files",
                    "She restores the big snapshot with a smaller size",
                ],
                best: 'D',
                because: "A filesystem ends where its disk ended when it was made or grown, and a guest in memory believes \
                          in all of it. A disk is a ratchet: choose small, grow late.",
            }),
            notes: Notes {
                minutes: 2,
                say: "CPUs and memory can be had and given back by the minute. Disks only grow, in every cloud, and so do \
                      the snapshots made of them.",
                wrong: "Nobody believes it: let them try it in the shell (s).",
            },
            ..Step::EMPTY
        },
    ],
};
