//! The story: a file for each chapter, to be read and edited without knowing how it is played.
//!
//! Who is who: Anna has a machine with a kitten page on it, and sells kittens' toys there. Ben, Cleo and Dora are her
//! visitors. Emil is her colleague, and Frida is his.

mod backup;
mod prologue;
mod scale;
mod share;
mod transient;

use super::Chapter;

/// The chapters, in their order.
pub const CHAPTERS: &[Chapter] =
    &[prologue::CHAPTER, backup::CHAPTER, scale::CHAPTER, share::CHAPTER, transient::CHAPTER];

/// Sets the stage with Anna's machine as the prologue left it.
const GOLDEN: &[&str] = &["catnap restore anna@golden -p {port}:80"];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_step_can_be_named_presented_and_answered() {
        let mut names = HashSet::new();
        let mut made = HashSet::new();
        for chapter in CHAPTERS {
            assert!(!chapter.title.is_empty() && !chapter.aim.is_empty());
            for step in chapter.steps {
                let name = format!("{}/{}", chapter.name, step.name);
                assert!(names.insert(name.clone()), "{name} is there twice");
                assert!(!step.title.is_empty() && !step.story.is_empty(), "{name}");
                assert!(!step.notes.say.is_empty() && !step.notes.wrong.is_empty() && step.notes.minutes > 0, "{name}");
                assert!(step.acts.is_empty() || !step.claims.is_empty(), "{name} measures and claims nothing");
                assert!(step.needs.iter().all(|need| made.contains(need)), "{name} needs what nobody has made");
                for snapshot in step.makes {
                    assert!(made.insert(snapshot), "{snapshot} is made twice");
                    let making = |act: &&super::super::Act| act.line.contains(snapshot);
                    assert!(step.acts.iter().any(|act| making(&act)), "{name} does not make {snapshot}");
                }
                if let Some(question) = &step.ask {
                    assert!(('A'..='E').contains(&question.best) && !question.because.is_empty(), "{name}");
                    assert!(question.answers.iter().all(|answer| !answer.is_empty()), "{name}");
                }
            }
        }
    }

    #[test]
    fn it_takes_a_lesson_of_45_minutes() {
        let minutes: u32 = CHAPTERS.iter().flat_map(|chapter| chapter.steps).map(|step| step.notes.minutes).sum();
        assert_eq!(minutes, 45);
    }
}
