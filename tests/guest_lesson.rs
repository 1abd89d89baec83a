//! The lesson, unattended: everything that it claims is measured here, too.

mod common;

use std::fs;
use std::path::PathBuf;

use common::ran::{self, Ran};
use common::{catnap, home};
use serde_json::Value;

/// A class room: the lesson's own home beside the tests', with the image in it.
struct Room(PathBuf);

impl Room {
    fn new() -> Room {
        let room = Room(home().with_file_name("lesson-room"));
        // A test that was killed has left it behind.
        room.leave();
        fs::create_dir_all(&room.0).expect("a folder");
        let archive = room.0.join("kitten.catnap");
        catnap(&["snapshot export kitten", archive.to_str().expect("a plain path"), "--yes"]).succeeds();
        room.ordinary(&["snapshot", "import", archive.to_str().expect("a plain path"), "--name", "kitten"]).succeeds();
        fs::remove_file(&archive).expect("the archive is there");
        room
    }

    fn ordinary(&self, words: &[&str]) -> Ran {
        ran::run(ran::command().env("CATNAP_HOME", &self.0).args(words))
    }

    fn lesson(&self, words: &str) -> Ran {
        // The program under test is not called catnap everywhere, and the lesson's commands say so.
        let mut command = ran::command();
        // Where there is a registry, it is known by the same words.
        if let Some(registry) = std::env::var_os("CATNAP_TEST_REGISTRY") {
            command.env("CATNAP_LESSON_REGISTRY", registry);
        }
        ran::run(command.env("CATNAP_LESSON_HOME", &self.0).arg("lesson").args(words.split(' ')))
    }

    /// Plays a stretch of it; each step's report, in the order in which they were played.
    fn play(&self, words: &str) -> Vec<Value> {
        let report = self.lesson(&format!("run --auto --json {words}")).succeeds();
        println!("{}", report.err);
        report.json().as_array().expect("a list").clone()
    }

    fn leave(&self) {
        if self.0.exists() {
            drop(self.lesson("reset"));
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.leave();
    }
}

fn names(report: &[Value]) -> Vec<&str> {
    report.iter().filter_map(|step| step["step"].as_str()).collect()
}

#[test]
fn what_the_lesson_says_of_backups_is_true() {
    let room = Room::new();
    let report = room.play("--until backup");
    assert_eq!(names(&report).len(), 9);
    let rows: Value =
        serde_json::from_slice(&fs::read(room.0.join("state/lesson/rows.json")).expect("rows.json")).expect("JSON");
    let kinds: Vec<&str> = rows.as_array().expect("a list").iter().filter_map(|row| row["kind"].as_str()).collect();
    assert_eq!(kinds, ["crash", "quiesced", "live"]);
    for row in rows.as_array().expect("a list") {
        let lost = row["found"].as_u64() < row["acknowledged"].as_u64();
        assert_eq!((lost, row["torn"] == 1), (row["kind"] == "crash", row["kind"] == "crash"), "{rows}");
    }
    room.lesson("check").succeeds();
    // A class jumps, and a student breaks something: the golden state is there again.
    room.ordinary(&["rm", "--force", "anna"]).succeeds();
    room.lesson("reset --to backup/stopped").succeeds();
    room.lesson("check").succeeds();
    assert_eq!(names(&room.play("--until backup/stopped")), ["backup/stopped"]);
}

#[test]
fn what_the_lesson_says_of_sizes_sharing_and_transient_disks_is_true() {
    let room = Room::new();
    // Nobody has seen the prologue: it is caught up with.
    let report = room.play("scale --until transient");
    let names = names(&report);
    assert_eq!(names.first(), Some(&"prologue/doctor"));
    for step in
        ["scale/more", "scale/ratchet", "share/push", "share/secrets", "share/stranger", "transient/replacement"]
    {
        assert!(names.contains(&step), "{names:?}");
    }
    // This host is not the lesson's to kill, and that is said.
    let death = report.iter().find(|step| step["step"] == "transient/death").expect("its report");
    assert!(death.to_string().contains("only simulated"), "{death}");
    room.lesson("reset").succeeds();
    assert_eq!(room.ordinary(&["ps", "-q"]).succeeds().text(), "");
    assert_eq!(room.ordinary(&["snapshot", "ls", "-q"]).succeeds().text(), "");
}
