//! Keys: own ones, with which snapshots are signed, and those of others whose signatures are known here.
//!
//! ```text
//! data/keys/NAME.public    whose signature is NAME's
//! data/keys/NAME.secret    only with an own key, and only for its owner's eyes
//! ```

use std::fs;
use std::io;
use std::path::PathBuf;

use super::{Error, Store};
use crate::snapshot::{PublicKey, SecretKey};
use crate::spec::Name;
use crate::sys::files::{self, At, names_in, read_bounded, write_atomically};
use crate::sys::random;

const PUBLIC: &str = ".public";
const SECRET: &str = ".secret";
/// The longest file of a key, in bytes.
const MAX_KEY: u64 = 1024;

/// A key by the name that it has here.
#[derive(Clone, Debug)]
pub struct Key {
    /// Its name here.
    pub name: Name,
    /// Whose signatures are meant.
    pub key: PublicKey,
    /// Whether it can sign here.
    pub own: bool,
}

impl Store {
    /// Makes a key that can sign.
    pub fn make_key(&self, name: &Name) -> Result<Key, Error> {
        self.check_key_free(name)?;
        let secret = SecretKey::from_random(random::bytes().at("read", random::SOURCE.as_ref())?);
        // It counts from when its public half is there.
        write_atomically(&self.key_path(name, SECRET), secret.to_text().as_bytes())?;
        self.write_public(name, secret.public())?;
        Ok(Key { name: name.clone(), key: secret.public(), own: true })
    }

    /// From now on, signatures by this key are known as those of `name`.
    pub fn trust_key(&self, name: &Name, key: PublicKey) -> Result<Key, Error> {
        self.check_key_free(name)?;
        self.write_public(name, key)?;
        Ok(Key { name: name.clone(), key, own: false })
    }

    /// Removes a key, with its secret half.
    pub fn remove_key(&self, name: &Name) -> Result<(), Error> {
        let public = self.key_path(name, PUBLIC);
        for path in [self.key_path(name, SECRET), public.clone()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && path == public => {
                    return Err(Error::NoKey(name.clone()));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.at("remove", &path)?,
            }
        }
        Ok(files::sync_dir(&self.folder("keys"))?)
    }

    /// All keys, in the order of their names.
    pub fn keys(&self) -> Result<Vec<Key>, Error> {
        let names = names_in(&self.folder("keys"))?;
        let names = names.iter().filter_map(|file| file.strip_suffix(PUBLIC)?.parse::<Name>().ok());
        names.map(|name| self.key(&name)).collect()
    }

    /// The key of that name.
    pub fn key(&self, name: &Name) -> Result<Key, Error> {
        let text = self.read_key(name, PUBLIC)?;
        let key = text.trim().parse::<PublicKey>().map_err(|error| self.bad_key(name, PUBLIC, error.to_string()))?;
        Ok(Key { name: name.clone(), key, own: self.key_path(name, SECRET).exists() })
    }

    /// The secret half of an own key.
    pub fn secret_key(&self, name: &Name) -> Result<SecretKey, Error> {
        if !self.key(name)?.own {
            return Err(Error::NotOwnKey(name.clone()));
        }
        let text = self.read_key(name, SECRET)?;
        SecretKey::from_text(&text).map_err(|error| self.bad_key(name, SECRET, error.to_string()))
    }

    fn check_key_free(&self, name: &Name) -> Result<(), Error> {
        match self.key_path(name, PUBLIC).exists() {
            true => Err(Error::KeyTaken(name.clone())),
            false => Ok(()),
        }
    }

    fn write_public(&self, name: &Name, key: PublicKey) -> Result<(), Error> {
        Ok(write_atomically(&self.key_path(name, PUBLIC), format!("{key}\n").as_bytes())?)
    }

    fn read_key(&self, name: &Name, half: &str) -> Result<String, Error> {
        let bytes = match read_bounded(&self.key_path(name, half), MAX_KEY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoKey(name.clone())),
            other => other?,
        };
        String::from_utf8(bytes).map_err(|_| self.bad_key(name, half, "it is not text".into()))
    }

    fn bad_key(&self, name: &Name, half: &str, why: String) -> Error {
        Error::Damaged { path: self.key_path(name, half), why }
    }

    fn key_path(&self, name: &Name, half: &str) -> PathBuf {
        self.folder("keys").join(format!("{name}{half}"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::snapshot::Digest;
    use crate::store::testing::store;

    #[test]
    fn keys_are_kept_and_only_own_ones_sign() {
        let (_dir, store) = store();
        let (anna, ben): (Name, Name) = ("anna".parse().unwrap(), "ben".parse().unwrap());
        let made = store.make_key(&anna).unwrap();
        let digest = Digest::of(b"x");
        let signature = store.secret_key(&anna).unwrap().sign(&digest);
        assert_eq!((signature.key, signature.check(&digest)), (made.key, Ok(())));
        let mode = store.key_path(&anna, SECRET).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        assert!(matches!(store.make_key(&anna), Err(Error::KeyTaken(_))));
        let other = SecretKey::from_random([9; 32]).public();
        store.trust_key(&ben, other).unwrap();
        assert!(matches!(store.trust_key(&ben, other), Err(Error::KeyTaken(_))));
        assert!(matches!(store.secret_key(&ben), Err(Error::NotOwnKey(_))));
        let listed: Vec<_> = store.keys().unwrap().into_iter().map(|key| (key.name, key.key, key.own)).collect();
        assert_eq!(listed, [(anna.clone(), made.key, true), (ben.clone(), other, false)]);

        store.remove_key(&anna).unwrap();
        assert!(matches!(store.remove_key(&anna), Err(Error::NoKey(_))));
        assert!(matches!(store.secret_key(&anna), Err(Error::NoKey(_))));
        assert!(!store.key_path(&anna, SECRET).exists());
        fs::write(store.key_path(&ben, PUBLIC), "ed25519:nonsense").unwrap();
        assert!(matches!(store.keys(), Err(Error::Damaged { .. })));
    }
}
