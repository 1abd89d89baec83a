//! The base image, made for real from the distribution's packages (which are fetched once and kept).

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use catnap::disk::{Access, Format, open};
use catnap::image::{self, Progress};
use catnap::snapshot::{MANIFEST, Role};
use catnap::store::{self, Snapshot, Store};
use catnap::sys::home::Home;

#[derive(Default)]
struct Said(Vec<String>);

impl Progress for Said {
    fn step(&mut self, what: &str, _: u64, _: u64) {
        self.0.push(what.into());
    }
    fn warn(&mut self, what: &str) {
        self.0.push(format!("warning: {what}"));
    }
}

/// A store of its own in `folder`, with the packages that earlier runs have fetched.
fn store(folder: &Path) -> Store {
    let home = Home::at(folder).unwrap();
    let cache = Home::at(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("image")).unwrap().cache;
    Store::open(&Home { cache, ..home }).unwrap()
}

/// How many things are in the making, or were left half-made.
fn staged(store: &Store) -> usize {
    let entries = fs::read_dir(store.root().join("staging")).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
}

#[test]
fn the_kitten_image_is_made_once_and_the_same_every_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let start = Instant::now();
    let made = thread::scope(|scope| {
        let ensure = || {
            let mut said = Said::default();
            (image::ensure(&store, &mut said).unwrap(), said.0)
        };
        let makers = [scope.spawn(ensure), scope.spawn(ensure)];
        makers.map(|maker| maker.join().unwrap())
    });
    println!("made in {:.1} s", start.elapsed().as_secs_f64());
    let [(image, one), (same, two)] = made;
    assert_eq!(image.digest, same.digest);
    assert!(one.is_empty() != two.is_empty(), "both made it: {one:?} {two:?}");
    for file in &image.manifest.files {
        println!("{:>10}: {} bytes", file.name, file.size);
    }
    check_contents(&store, &image);

    let start = Instant::now();
    let mut silent = Said::default();
    assert_eq!(image::ensure(&store, &mut silent).unwrap().digest, image.digest);
    println!("found in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    assert!(silent.0.is_empty(), "{:?}", silent.0);

    assert_eq!(image::build(&store, &mut Said::default()).unwrap().digest, image.digest);
    assert_eq!(staged(&store), 0);
    one_flipped_bit_is_refused_by_name(&store, &image);
}

/// The kernel needs no unpacking, the initramfs has what leads to the root disk, and the disk is small.
fn check_contents(store: &Store, image: &Snapshot) {
    let kernel = fs::read(image.file(Role::Kernel).unwrap()).unwrap();
    assert!(kernel.starts_with(b"\x7fELF"));
    let initrd = fs::read(image.file(Role::Initrd).unwrap()).unwrap();
    let list = initrd.windows(12).position(|window| window == b"modules/load").expect("a list of modules");
    let list = String::from_utf8_lossy(&initrd[list..list + 1000]);
    for module in ["virtio_blk.ko", "virtio_mmio.ko", "vmw_vsock_virtio_transport.ko", "virtio_mem.ko"] {
        assert!(list.contains(module), "{list}");
    }
    let disk = image.file(Role::Disk).unwrap();
    assert_eq!(open(&disk, Format::Qcow2, Access::ReadOnly, store.root()).unwrap().len(), 2 << 30);
    assert!(fs::metadata(&disk).unwrap().len() < 16 << 20);
}

fn one_flipped_bit_is_refused_by_name(store: &Store, image: &Snapshot) {
    for file in ["kernel", "initrd", "root.qcow2", MANIFEST] {
        let path = image.dir.join(file);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 4;
        replace(&path, &bad);
        let error = image::ensure(store, &mut Said::default()).unwrap_err();
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        let damaged = matches!(error, image::Error::Store(store::Error::Damaged { .. } | store::Error::Manifest(_)));
        assert!(damaged, "{error:?}");
        replace(&path, &good);
    }
    image::ensure(store, &mut Said::default()).unwrap();
}

/// Puts other content into a file of the store, which is write-protected.
fn replace(path: &Path, bytes: &[u8]) {
    let aside = path.with_file_name(".aside");
    fs::write(&aside, bytes).unwrap();
    fs::rename(&aside, path).unwrap();
}

#[test]
fn a_killed_maker_leaves_nothing_that_anyone_sees() {
    const FOLDER: &str = "CATNAP_TEST_MAKER_FOLDER";
    if let Some(folder) = std::env::var_os(FOLDER) {
        image::build(&store(Path::new(&folder)), &mut Said::default()).unwrap();
        return;
    }
    for milliseconds in [100, 700, 2000] {
        let dir = tempfile::tempdir().unwrap();
        let mut maker = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_maker_leaves_nothing_that_anyone_sees"])
            .env(FOLDER, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(milliseconds));
        maker.kill().unwrap();
        maker.wait().unwrap();
        let store = store(dir.path());
        // A fast machine may have been done with it; then it must be whole.
        match store.resolve(image::NAME) {
            Ok(image) => store.verify(&image, |_, _| {}).unwrap(),
            Err(error) => assert!(matches!(error, store::Error::NoSnapshot(_)), "{error}"),
        }
        assert!(store.list().unwrap().iter().all(|listed| listed.snapshot.is_ok()));
        // The programs that it had started end with it, but not before it.
        let patience = Instant::now() + Duration::from_secs(20);
        while staged(&store) > 0 {
            assert!(Instant::now() < patience, "{} folders stay", staged(&store));
            store.sweep().unwrap();
        }
    }
}
