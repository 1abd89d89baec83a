//! The player, with lessons of two lines: real commands in a folder of their own, and no machines.

use std::cell::RefCell;
use std::io::{self, Write};
use std::rc::Rc;

use super::progress::Progress;
use super::*;

const NOTES: Notes = Notes { minutes: 1, say: "say", wrong: "wrong" };

/// A step with the text and name that every step has.
const fn step(name: &'static str, acts: &'static [Act], claims: &'static [Claim]) -> Step {
    Step { name, title: "A step", story: "Once upon a time.", acts, claims, notes: NOTES, ..Step::EMPTY }
}

const fn chapter(name: &'static str, steps: &'static [Step]) -> Chapter {
    Chapter { name, title: "A chapter", aim: "An aim.", strike: &["rm -f struck"], steps }
}

const LESSON: &[Chapter] = &[
    chapter(
        "one",
        &[
            Step {
                stage: &["echo set > stage"],
                ..step(
                    "first",
                    &[run("echo first >> played; echo '{\"pause_us\": 1500}'").named("taken")],
                    &[Claim {
                        says: "It took {taken.pause_us:ms}.",
                        holds: |f| Some(f.number("taken.pause_us")? < 2000.0),
                    }],
                )
            },
            Step {
                stage: &["echo set for second > stage"],
                ..step(
                    "second",
                    &[run("echo second >> played"), run("false").exits(1)],
                    &[Claim {
                        says: "The chapter's figures are known: {taken.pause_us}.",
                        holds: |f| f.number("taken.pause_us").map(|_| true),
                    }],
                )
            },
        ],
    ),
    chapter("two", &[step("third", &[run("echo third >> played; touch struck")], &[])]),
];

/// Where a show goes, to be read afterwards.
#[derive(Clone, Default)]
struct Paper(Rc<RefCell<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A class room: a desk, and what was shown.
struct Room {
    folder: tempfile::TempDir,
    paper: Paper,
}

impl Room {
    fn new() -> Room {
        Room { folder: tempfile::tempdir().unwrap(), paper: Paper::default() }
    }

    fn player(&self, lesson: &'static [Chapter], host_is_ours: bool) -> Player<'static> {
        let look = Look { unattended: true, notes: true, ..Look::default() };
        let desk = Desk::at(&self.folder.path().join("home")).unwrap();
        Player::new(lesson, desk, Show::into(Box::new(self.paper.clone()), look), host_is_ours).unwrap()
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join("home/desk").join(name)).unwrap_or_default()
    }

    fn shown(&self) -> String {
        String::from_utf8(self.paper.0.borrow().clone()).unwrap()
    }
}

#[test]
fn a_lesson_is_played_to_its_end_with_real_commands() {
    let room = Room::new();
    let mut player = room.player(LESSON, false);
    assert_eq!(player.play(0, 2).unwrap(), Verdict::Done);
    assert_eq!((room.file("played").as_str(), room.file("stage").as_str()), ("first\nsecond\nthird\n", "set\n"));
    assert_eq!(player.next(), None);
    let said: Vec<_> =
        player.report.iter().flat_map(|played| &played.claims).map(|claim| claim.says.as_str()).collect();
    assert_eq!(said, ["It took 1.5 ms.", "The chapter's figures are known: 1500."]);
    let shown = room.shown();
    for words in ["$ echo first >> played", "\"pause_us\": 1500", "✓ It took 1.5 ms.", "say: say", "goes wrong: wrong"]
    {
        assert!(shown.contains(words), "{words} in {shown}");
    }
}

#[test]
fn it_goes_on_where_it_was_left() {
    let room = Room::new();
    room.player(LESSON, false).play(0, 0).unwrap();
    let mut player = room.player(LESSON, false);
    assert_eq!((player.next(), player.is_played(0), player.is_played(1)), (Some(1), true, false));
    player.play(1, 1).unwrap();
    // Nothing was set anew in between: the stage is the first step's.
    assert_eq!((room.file("played").as_str(), room.file("stage").as_str()), ("first\nsecond\n", "set\n"));
}

#[test]
fn back_and_reset_set_the_stage_and_forget_what_came_after() {
    let room = Room::new();
    let mut player = room.player(LESSON, false);
    player.play(0, 2).unwrap();
    player.stage(1).unwrap();
    assert_eq!(room.file("stage"), "set for second\n");
    assert_eq!((player.next(), player.is_played(0), player.is_played(1)), (Some(1), true, false));
    assert!(!room.folder.path().join("home/desk/struck").exists(), "what a chapter left behind is cleared away");
    player.play(1, 1).unwrap();
    player.forget().unwrap();
    assert_eq!((player.next(), player.is_played(0)), (Some(0), false));
}

#[test]
fn whoever_jumps_ahead_is_caught_up_with() {
    let room = Room::new();
    let mut player = room.player(LESSON, false);
    player.stage(1).unwrap();
    assert_eq!((room.file("played").as_str(), player.next(), player.is_played(0)), ("first\n", Some(1), true));
}

#[test]
fn what_does_not_hold_fails_and_is_played_again() {
    const WRONG: &[Chapter] = &[chapter(
        "wrong",
        &[
            step("claim", &[run("true")], &[Claim { says: "Two and two are five.", holds: |_| Some(2 + 2 == 5) }]),
            step("code", &[run("false")], &[]),
            step("success", &[run("true").exits(1)], &[]),
            step("unknown", &[run("true")], &[Claim { says: "It took {taken.us}.", holds: |_| Some(true) }]),
            step("unmeasured", &[run("true")], &[Claim { says: "It was.", holds: |f| f.number("x").map(|_| true) }]),
            step("unfilled", &[run("echo {nobody.knows}")], &[]),
        ],
    )];
    let fails = |place: usize| {
        let room = Room::new();
        let mut player = room.player(WRONG, false);
        // A step that failed must not be caught up with by those behind it, so the player is put there.
        player.arrive(place, true).unwrap();
        let error = player.play(place, place).unwrap_err();
        assert_eq!((player.next(), player.is_played(place)), (Some(place), false), "{error}");
        (error, room.shown())
    };
    let (error, shown) = fails(0);
    assert!(matches!(error, Error::Claims { missed: 1, .. }) && shown.contains("✗ Two and two are five."), "{shown}");
    assert!(matches!(fails(1).0, Error::Ended { code: 1, wanted: 0, .. }));
    assert!(matches!(fails(2).0, Error::Ended { code: 0, wanted: 1, .. }));
    assert!(matches!(fails(3).0, Error::Claims { .. }), "a figure that was not measured bears nothing out");
    assert!(matches!(fails(4).0, Error::Claims { .. }));
    assert!(matches!(fails(5).0, Error::NoFigure(name) if name == "nobody.knows"));
}

#[test]
fn a_figure_that_others_can_spoil_is_measured_again() {
    const PATIENT: &[Chapter] = &[chapter(
        "patient",
        &[Step {
            tries: 3,
            ..step(
                "third-time",
                &[run("echo x >> count; grep -c x count").named("count")],
                &[Claim { says: "It is the third.", holds: |f| Some(f.text("count.text")? == "3") }],
            )
        }],
    )];
    let room = Room::new();
    let mut player = room.player(PATIENT, false);
    player.play(0, 0).unwrap();
    assert_eq!(player.report.len(), 3);
    assert!(room.player(PATIENT, false).play(0, 0).is_err(), "there are six by now");
}

#[test]
fn what_this_place_does_not_have_is_told_and_not_played() {
    const RARE: &[Chapter] = &[chapter(
        "rare",
        &[
            Step {
                only_with: Some(("unicorn", "There is no unicorn here.")),
                ..step("unicorn", &[run("touch ridden")], &[Claim { says: "{unicorn}", holds: |_| Some(false) }])
            },
            step("horse", &[run("touch walked")], &[]),
        ],
    )];
    let room = Room::new();
    let mut player = room.player(RARE, false);
    player.play(0, 1).unwrap();
    assert!(room.shown().contains("There is no unicorn here."));
    let there = |name| room.folder.path().join("home/desk").join(name).exists();
    assert_eq!((there("ridden"), there("walked"), player.is_played(0)), (false, true, true));
    // What was not claimed is not missed either.
    room.player(RARE, false).arrive(1, true).unwrap();
    assert!(room.player(RARE, false).standing().missed.is_empty());
}

const DEADLY: &[Chapter] = &[chapter(
    "deadly",
    &[step(
        "death",
        &[run("pull the plug").when(When::Real), run("touch killed").when(When::Simulated), run("touch after")],
        &[Claim { says: "Its death was {host.how}.", holds: |f| Some(f.get("host.real")?.is_boolean()) }],
    )],
)];

#[test]
fn a_host_that_is_not_ours_dies_in_play_only() {
    let room = Room::new();
    let mut player = room.player(DEADLY, false);
    assert_eq!(player.play(0, 0).unwrap(), Verdict::Done);
    assert!(room.folder.path().join("home/desk/killed").exists());
    assert!(room.shown().contains("only simulated"));
}

#[test]
fn a_host_that_is_ours_has_to_die_before_it_goes_on() {
    let room = Room::new();
    assert_eq!(room.player(DEADLY, true).play(0, 0).unwrap(), Verdict::HostDies);
    assert!(room.shown().contains("$ pull the plug"));
    // It was told to die and did not.
    assert!(matches!(room.player(DEADLY, true).play(0, 0), Err(Error::HostLives)));
    assert!(matches!(room.player(DEADLY, true).play(0, 0), Err(Error::HostLives)));
    // Another boot: what is kept is from the one before.
    let state = Desk::at(&room.folder.path().join("home")).unwrap().state;
    Progress { dies_in: Some("another boot".into()), ..Progress::read(&state).unwrap() }.write(&state).unwrap();
    let mut player = room.player(DEADLY, true);
    assert_eq!(player.play(0, 0).unwrap(), Verdict::Done);
    assert!(room.folder.path().join("home/desk/after").exists());
    assert!(!room.folder.path().join("home/desk/killed").exists());
}

#[test]
fn steps_are_found_by_chapter_name_and_number() {
    let room = Room::new();
    let player = room.player(LESSON, false);
    let find = |text: &str| player.find(text).ok();
    assert_eq!(["one", "one/first", "one/2", "two", "two/1"].map(find), [Some(0), Some(0), Some(1), Some(2), Some(2)]);
    assert_eq!(["", "three", "one/3", "one/0", "two/first", "one/second/x"].map(find), [None; 6]);
    assert_eq!((player.find_last("one").unwrap(), player.find_last("one/first").unwrap()), (1, 0));
}

#[test]
fn progress_that_cannot_be_read_is_an_error_and_not_a_new_beginning() {
    let room = Room::new();
    let desk = Desk::at(&room.folder.path().join("home")).unwrap();
    std::fs::write(desk.state.join("progress.json"), "{").unwrap();
    assert!(Progress::read(&desk.state).is_err());
}

#[test]
fn commands_find_this_program_and_the_lessons_home() {
    let room = Room::new();
    let desk = Desk::at(&room.folder.path().join("home")).unwrap();
    let said = desk.command("sh").args(["-c", "echo $CATNAP_HOME; command -v catnap; pwd"]).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    let home = desk.home.display();
    assert_eq!(said, format!("{home}\n{home}/state/lesson/bin/catnap\n{home}/desk\n"));
}

#[test]
fn ports_stay_unless_others_are_wanted() {
    let room = Room::new();
    let mut player = room.player(LESSON, false);
    player.choose_ports(None).unwrap();
    let before = player.progress.ports.clone();
    assert_eq!(before.len(), 4);
    player.arrive(1, true).unwrap();
    player.choose_ports(before.first().copied()).unwrap();
    assert_eq!((&player.progress.ports, player.progress.staged), (&before, true));
    player.choose_ports(Some(before[3] + 1)).unwrap();
    assert!(player.progress.ports[0] > before[3] && !player.progress.staged);
}
