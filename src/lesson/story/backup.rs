//! Backup: what happens when a running machine is snapshotted, and why that is a somewhat imperfect backup.

use super::GOLDEN;
use crate::lesson::{At, Chapter, Claim, Notes, Question, Step, run};

pub const CHAPTER: Chapter = Chapter {
    name: "backup",
    title: "Snapshots as a backup",
    aim: "Understand what happens when a snapshot of a running machine is made, and why it is a somewhat imperfect \
          backup.",
    strike: &[],
    steps: &[
        Step {
            name: "live",
            title: "A snapshot while it runs",
            story: "It is Monday, and Anna wants a backup, but her visitors must not notice. She takes a snapshot of the \
                    running machine.",
            watch: "The counter on the page goes on. The command is busy for much longer than the machine stands still.",
            stage: GOLDEN,
            needs: &["anna@golden"],
            makes: &["anna@monday"],
            acts: &[run("catnap snapshot create anna@monday --json").named("live").watching("anna")],
            looks: &[At { name: "monday", port: "port", path: "/api/status" }],
            claims: &[
                Claim {
                    says: "The machine stood still for {live.pause_us:ms}.",
                    holds: |f| Some(f.number("live.pause_us")? > 0.0),
                },
                Claim {
                    says: "That is less than one tick of its counter, which went from {watch.first.ticks} to \
                           {watch.last.ticks} and never back.",
                    holds: |f| {
                        let counted = f.number("watch.ticks")? >= 2.0 && f.number("watch.setbacks")? == 0.0;
                        Some(counted && f.number("live.pause_us")? < 500_000.0)
                    },
                },
                Claim {
                    says: "The snapshot was finished after {live.duration_ms} ms, when the machine had long gone on: its \
                           memory is written from a frozen copy, while the original runs.",
                    holds: |f| Some(f.number("live.duration_ms")? * 1000.0 > f.number("live.pause_us")?),
                },
                Claim {
                    says: "It is the same run of the same machine as before.",
                    holds: |f| f.same("watch.first.boot_id", "watch.last.boot_id"),
                },
            ],
            figure: "{live.pause_us:ms} of standing still",
            ask: Some(Question {
                text: "Why is the snapshot finished later than the machine goes on?",
                answers: [
                    "The network is slow",
                    "The machine is paused twice",
                    "The pause only freezes a copy; writing it to the disk comes afterwards",
                    "The guest has to shut its programs down first",
                    "It is not: both end together",
                ],
                best: 'C',
                because: "The monitor forks. The child holds memory as it was at that instant and writes it at the disk's \
                          speed; the guest waits for the fork and for nothing else.",
            }),
            notes: Notes {
                minutes: 3,
                say: "Have somebody count aloud with the page. Then show the two numbers: the pause, and how long the \
                      command took. A snapshot is of one instant; making it takes longer than that.",
                wrong: "On a busy laptop the pause may reach tens of milliseconds. It is measured, so say what you see.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "kinds",
            title: "Three kinds of one moment",
            story: "Ben writes into the guest book and is thanked when his row is on the disk. Cleo is thanked a little \
                    early, while hers is in memory only. Dora is in the middle of writing at the very moment of each \
                    snapshot: she rings a bell, and the snapshot is taken before she hears an answer.",
            watch: "The same moment is kept three times: as after a power cut (crash), with the filesystems frozen by the \
                    guest (quiesced), and with memory (live).",
            stage: GOLDEN,
            needs: &["anna@golden", "anna@monday"],
            cast: &["anna"],
            makes: &["anna@crash", "anna@quiesced", "anna@live"],
            acts: &[
                run("catnap lesson visit anna --json").named("visit"),
                run(
                    "catnap snapshot create anna@crash --mode crash --at-doorbell & catnap lesson visit anna --ring crash; \
                     wait $!",
                ),
                run("catnap snapshot create anna@quiesced --mode quiesced --at-doorbell & \
                     catnap lesson visit anna --ring quiesced; wait $!"),
                run("catnap snapshot create anna@live --mode live --at-doorbell & \
                     catnap lesson visit anna --ring live --json; wait $!")
                .named("rung"),
            ],
            claims: &[
                Claim {
                    says: "{rung.acknowledged} rows were acknowledged to visitors.",
                    holds: |f| Some(f.number("visit.acknowledged")? == 2.0 && f.number("rung.acknowledged")? >= 5.0),
                },
                Claim {
                    says: "Each snapshot was taken while Dora was writing.",
                    holds: |f| Some(f.text("rung.open")?.starts_with("Dora")),
                },
            ],
            ask: Some(Question {
                text: "Which rows will a machine have that boots from the crash snapshot?",
                answers: [
                    "All of them",
                    "Ben's and Cleo's",
                    "Ben's",
                    "Cleo's and Dora's",
                    "None: the database is broken",
                ],
                best: 'C',
                because: "What was on the disk is there. Cleo was thanked too early, and Dora not at all. Next, we look.",
            }),
            notes: Notes {
                minutes: 3,
                say: "The bell makes it certain that Dora is in the middle of writing; without it we would need luck. \
                      Cleo is every program that says \"saved\" before the disk has it. Collect guesses by cards.",
                wrong: "It is said that nobody waits for the ring: something else took the snapshot's place. r, and again.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "rows",
            title: "Side by side",
            story: "Anna makes a machine from each of the three and reads the guest books side by side.",
            watch: "Acknowledged: a visitor was thanked before the snapshot. Found: how many of those rows are there. Torn: \
                    Dora's row, begun and gone.",
            needs: &["anna@crash", "anna@quiesced", "anna@live"],
            acts: &[
                run("catnap restore anna@crash --name crash -p {port2}:80"),
                run("catnap restore anna@quiesced --name quiesced -p {port3}:80"),
                run("catnap restore anna@live --name live -p {port4}:80"),
                run("catnap lesson rows crash quiesced live"),
                run("catnap rm --force crash quiesced live"),
            ],
            claims: &[
                Claim {
                    says: "crash: {rows.crash.acknowledged} acknowledged, {rows.crash.found} found, {rows.crash.torn} torn. \
                           Thanks were given for rows that are gone.",
                    holds: |f| {
                        let lost = f.number("rows.crash.found")? < f.number("rows.crash.acknowledged")?;
                        Some(lost && f.number("rows.crash.found")? >= 1.0 && f.number("rows.crash.torn")? == 1.0)
                    },
                },
                Claim {
                    says: "quiesced: {rows.quiesced.acknowledged} acknowledged, {rows.quiesced.found} found, \
                           {rows.quiesced.torn} torn. The guest brought its work to an end first.",
                    holds: |f| {
                        let all = f.same("rows.quiesced.found", "rows.quiesced.acknowledged")?;
                        Some(all && f.number("rows.quiesced.torn")? == 0.0)
                    },
                },
                Claim {
                    says: "live: {rows.live.acknowledged} acknowledged, {rows.live.found} found, {rows.live.torn} torn. \
                           Dora woke with the machine and finished her sentence.",
                    holds: |f| {
                        let all = f.same("rows.live.found", "rows.live.acknowledged")?;
                        Some(all && f.number("rows.live.torn")? == 0.0)
                    },
                },
                Claim {
                    says: "SQLite finds no fault with any of the books: it throws half-written rows away.",
                    holds: |f| {
                        let ok = |kind: &str| Some(f.text(&format!("rows.{kind}.integrity"))? == "ok");
                        Some(ok("crash")? && ok("quiesced")? && ok("live")?)
                    },
                },
            ],
            figure: "{rows.crash.found} of {rows.crash.acknowledged} acknowledged rows survived the crash snapshot",
            ask: Some(Question {
                text: "Your cloud offers a button \"create snapshot\". The machine is running. What do you get?",
                answers: [
                    "Usually something like crash: disks, as after a power cut",
                    "Always something like quiesced",
                    "Always something like live, with memory",
                    "Nothing, until the machine is shut down",
                    "A copy that changes along with the machine",
                ],
                best: 'A',
                because: "Most clouds snapshot disks. Whether the guest is asked to hold still first depends on an agent in \
                          it. Find out, and do not assume.",
            }),
            notes: Notes {
                minutes: 3,
                say: "Nothing is broken, and yet something that was promised is gone. A crash-consistent backup is as good \
                      as your programs are at surviving a power cut.",
                wrong: "Little memory: four machines run at once. Close the browser's other tabs.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "stopped",
            title: "Shut it down first",
            story: "Safest of all: shut the machine down, take the snapshot, start it again. Anna looks at what that costs.",
            watch: "The page goes away. The counter begins anew: everything that was only in memory is lost.",
            stage: GOLDEN,
            needs: &["anna@golden"],
            cast: &["anna"],
            makes: &["anna@clean"],
            acts: &[run("catnap stop anna && catnap snapshot create anna@clean --json && catnap start anna")
                .named("clean")
                .watching("anna")],
            looks: &[At { name: "tuesday", port: "port", path: "/api/status" }],
            claims: &[
                Claim {
                    says: "The kind is {clean.kind}: nothing was running, so nothing was in the middle of anything.",
                    holds: |f| Some(f.text("clean.kind")? == "clean"),
                },
                Claim {
                    says: "Visitors found nobody for {watch.silence_us:ms}; the live snapshot cost them {live.pause_us:ms}.",
                    holds: |f| Some(f.number("watch.silence_us")? > 2.0 * f.number("live.pause_us")?),
                },
                Claim {
                    says: "It is another run: what was only in memory is gone, and the counter began anew. It is at \
                           {watch.last.ticks}.",
                    holds: |f| {
                        let another = !f.same("watch.first.boot_id", "watch.last.boot_id")?;
                        Some(another && !f.same("watch.first.nonce", "watch.last.nonce")?)
                    },
                },
            ],
            figure: "{watch.silence_us:ms} without a page",
            notes: Notes {
                minutes: 2,
                say: "This is the textbook's way, and the price is downtime. Whoever cannot pay it needs a guest that can \
                      hold still for a moment: quiesced.",
                wrong: "The page in the browser shows an error for a while. That is the point.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "restore",
            title: "Terminate, restore, check",
            story: "A backup is worth what its restore is worth. Anna removes her machine for good, brings Monday back, and \
                    looks whether it is all there.",
            watch: "Which rows of the guest book are missing now, and why?",
            stage: &["catnap restore anna@clean --name anna -p {port}:80"],
            needs: &["anna@monday", "anna@clean"],
            cast: &["anna"],
            acts: &[
                run("catnap rm --force anna"),
                run("catnap snapshot verify anna@monday"),
                run("catnap restore anna@monday -p {port}:80 --json").named("restored"),
            ],
            looks: &[
                At { name: "after", port: "port", path: "/api/status" },
                At { name: "book", port: "port", path: "/api/guestbook/check" },
            ],
            claims: &[
                Claim {
                    says: "It is back, and answered after {restored.ready_us:ms}: the very run that was snapshotted.",
                    holds: |f| {
                        let same =
                            f.same("after.nonce", "monday.nonce")? && f.same("after.boot_id", "monday.boot_id")?;
                        Some(same && f.get("restored.resumed")?.as_bool()?)
                    },
                },
                Claim {
                    says: "SQLite says of the guest book: {book.integrity}.",
                    holds: |f| Some(f.text("book.integrity")? == "ok"),
                },
                Claim {
                    says: "It has {after.guestbook_entries} rows and not {tuesday.guestbook_entries}: whatever came after \
                           Monday's snapshot is gone.",
                    holds: |f| Some(f.number("after.guestbook_entries")? < f.number("tuesday.guestbook_entries")?),
                },
            ],
            figure: "{restored.ready_us:ms} to be back",
            ask: Some(Question {
                text: "What is the weakest point of this backup?",
                answers: [
                    "It is too slow",
                    "It lies on the same disk as the machine, and ends with it",
                    "It cannot be checked",
                    "It has no name",
                    "The counter is wrong afterwards",
                ],
                best: 'B',
                because: "A snapshot on the same host is an undo button. A backup is somewhere else, is made often enough, \
                          and has been restored by somebody who then looked.",
            }),
            notes: Notes {
                minutes: 2,
                say: "Three verbs to remember: verify, restore, look. The rows since Monday are the price of the time \
                      between two backups.",
                wrong: "Somebody still needs the machine that was removed: it is gone, and r brings the step back.",
            },
            ..Step::EMPTY
        },
        Step {
            name: "checklist",
            title: "Your checklist",
            story: "Write your own, on paper. One line each:\n\
                    1. What must survive, and where does it lie: which disk, which database, which memory?\n\
                    2. Which kind of snapshot does that need: live, crash, quiesced, or shut down first?\n\
                    3. How often, and how much may be lost in between?\n\
                    4. Where does the copy lie that survives this host, this room, this account?\n\
                    5. Who restored it last, when, and how did they check?",
            stage: GOLDEN,
            needs: &["anna@golden"],
            watch: "Compare with your neighbour: which line is the hardest to fill in?",
            notes: Notes {
                minutes: 2,
                say: "Two minutes, in silence, then pairs. Line 5 is the one that most people cannot answer.",
                wrong: "Somebody is done at once: ask where the password of the backup is.",
            },
            ..Step::EMPTY
        },
    ],
};
