//! The files that are a machine's own.
//!
//! ```text
//! root.qcow2 ──► root-7.qcow2 ──► root-4.qcow2 ──► ../../snapshots/…/root.qcow2
//! the top        own layers, sealed one after the other              the base
//! ```
//!
//! The top always keeps its name, and what was sealed stands beside it under a number. Each new layer gets a number
//! above all that are there, so along the chain they fall, and no number comes to mean something else while a
//! file names it. Names of this form and nothing else make a layer a machine's own: a snapshot takes them all,
//! under the same names, so that they find each other there as well.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Format, Header, MAX_LAYERS};
use crate::sys::files::{At, names_in, unique_name};

const SUFFIX: &str = ".qcow2";

/// What a machine's disk consists of below its top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnLayers {
    /// The machine's own layers, the lowest first. They stand beside the top. Sealed are those which the machine
    /// does not have locked.
    pub layers: Vec<PathBuf>,
    /// What the lowest of them, or the top when there are none, is made over: the name as it is written there,
    /// relative to the folder and *not* checked, and its format.
    pub base: Option<(String, Format)>,
}

/// Follows the names from the top, such as `root.qcow2`, down to the first that is not beside it.
pub fn own_layers(top: &Path) -> Result<OwnLayers, Error> {
    let names = Names::of(top)?;
    let mut layers = Vec::new();
    let (mut at, mut last) = (top.to_path_buf(), u32::MAX);
    let base = loop {
        match own_header(&at)?.backing {
            Some((name, format)) if let Some(number) = names.number(&name) => {
                if number >= last || format != Format::Qcow2 {
                    return Err(Error::refused(&at, format!("its backing file {name} is not an earlier layer")));
                }
                if layers.len() + 1 == MAX_LAYERS {
                    return Err(Error::TooManyLayers(top.into()));
                }
                (at, last) = (names.layer(number), number);
                layers.push(at.clone());
            }
            base => break base,
        }
    };
    layers.reverse();
    Ok(OwnLayers { layers, base })
}

/// Removes what a killed monitor left beside a top: files that were not finished, and numbered ones that the
/// chain does not lead to. Returns how many. Only for whoever has the machine's lock, and before it runs.
pub fn tidy(top: &Path) -> Result<usize, Error> {
    let names = Names::of(top)?;
    // First the whole chain: when it cannot be read, nothing is known to be of no use.
    let own = own_layers(top)?;
    let mut removed = 0;
    for entry in fs::read_dir(names.dir).at("read", names.dir)? {
        let path = entry.at("read", names.dir)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let unused = names.number(name).is_some() && !own.layers.contains(&path);
        if unused || names.is_temporary(name) {
            fs::remove_file(&path).at("remove", &path)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// The header of a machine's own file: neither a link nor anything that could block.
pub(super) fn own_header(path: &Path) -> Result<Header, Error> {
    if !fs::symlink_metadata(path).at("find", path)?.is_file() {
        return Err(Error::refused(path, "it is not a plain file"));
    }
    Header::read(path)
}

/// The names beside one top.
#[derive(Clone, Copy)]
pub(super) struct Names<'a> {
    dir: &'a Path,
    /// The top's name without `.qcow2`.
    stem: &'a str,
}

impl<'a> Names<'a> {
    pub(super) fn of(top: &'a Path) -> Result<Names<'a>, Error> {
        let stem = top.file_name().and_then(|name| name.to_str()?.strip_suffix(SUFFIX)).filter(|stem| !stem.is_empty());
        match (top.parent(), stem) {
            (Some(dir), Some(stem)) => Ok(Names { dir, stem }),
            _ => Err(Error::refused(top, "its name does not end in .qcow2")),
        }
    }

    pub(super) fn dir(&self) -> &'a Path {
        self.dir
    }

    /// The path of the layer with this number.
    pub(super) fn layer(&self, number: u32) -> PathBuf {
        self.dir.join(self.layer_name(number))
    }

    pub(super) fn layer_name(&self, number: u32) -> String {
        format!("{}-{number}{SUFFIX}", self.stem)
    }

    /// The number of the layer that is called so, when it is a layer and spelt as we spell it.
    fn number(&self, name: &str) -> Option<u32> {
        let digits = name.strip_prefix(self.stem)?.strip_prefix('-')?.strip_suffix(SUFFIX)?;
        digits.parse().ok().filter(|number| *number > 0 && self.layer_name(*number) == name)
    }

    /// A number above all that are there.
    pub(super) fn next(&self) -> Result<u32, Error> {
        let highest = names_in(self.dir)?.iter().filter_map(|name| self.number(name)).max().unwrap_or(0);
        // The highest of all numbers names no layer: own_layers wants each to be below something.
        match highest.checked_add(1) {
            Some(next) if next < u32::MAX => Ok(next),
            _ => Err(io::Error::from(io::ErrorKind::StorageFull)).at("number another layer in", self.dir)?,
        }
    }

    /// A path for a file that is not finished yet. Hidden, so that nobody lists it.
    pub(super) fn temporary(&self) -> PathBuf {
        self.dir.join(format!(".{}-{}", self.stem, unique_name()))
    }

    fn is_temporary(&self, name: &str) -> bool {
        name.strip_prefix('.').and_then(|name| name.strip_prefix(self.stem)).is_some_and(|rest| rest.starts_with('-'))
    }
}
