use std::io::Write;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;

const HIGH: u64 = 1 << 32;

fn zeros(address: u64, pages: u64) -> Piece {
    Piece { address, length: pages * PAGE, source: Source::Zeros }
}

fn data(address: u64, pages: u64, file: usize, page: u64) -> Piece {
    Piece { address, length: pages * PAGE, source: Source::File { file, offset: page * PAGE } }
}

/// Every page of the file says which it is.
fn file(number: u8, pages: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        let mut bytes = [number; PAGE as usize];
        bytes[..8].copy_from_slice(&page.to_le_bytes());
        file.write_all(&bytes).unwrap();
    }
    file
}

/// The pieces say what each page should be.
fn assert_is(mem: &GuestMemory, pieces: &[Piece]) {
    for piece in pieces {
        for n in 0..piece.length / PAGE {
            let mut bytes = [0; PAGE as usize];
            mem.read_slice(&mut bytes, GuestAddress(piece.address + n * PAGE)).unwrap();
            let mut expected = [0; PAGE as usize];
            if let Source::File { file, offset } = piece.source {
                expected.fill(file as u8 + 1);
                expected[..8].copy_from_slice(&(offset / PAGE + n).to_le_bytes());
            }
            assert!(bytes == expected, "page {n} of {piece:?}");
        }
    }
}

/// How many mappings of this process lie in a region.
fn mappings(ram: &Ram) -> usize {
    let start = ram.mapping().as_ptr() as usize;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let first = |line: &str| usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
    maps.lines().filter(|line| (start..start + ram.mapping().size()).contains(&first(line))).count()
}

#[test]
fn long_pieces_are_mapped_short_ones_read_and_zeros_left_alone() {
    let files = [file(1, 100), file(2, 40)];
    let pieces = [
        data(0, 20, 0, 0),
        data(20 * PAGE, 2, 1, 0),
        data(22 * PAGE, 8, 0, 22),
        zeros(30 * PAGE, 3),
        data(33 * PAGE, 17, 0, 33),
        data(50 * PAGE, 30, 1, 5),
        zeros(80 * PAGE, 600),
        data(680 * PAGE, 3, 1, 2),
        data(HIGH, 5, 0, 90),
        zeros(HIGH + 5 * PAGE, 3),
    ];
    let regions = [(GuestAddress(0), 683 * PAGE), (GuestAddress(HIGH), 8 * PAGE)];
    let mem = restore(&regions, &pieces, &files.each_ref()).unwrap();
    assert_is(&mem, &pieces);
    let rams: Vec<&Ram> = mem.iter().collect();
    assert_eq!(rams.iter().map(|ram| ram.is_anonymous()).collect::<Vec<_>>(), [false, true]);
    assert_eq!(rams.iter().map(|ram| mappings(ram)).collect::<Vec<_>>(), [3, 1]);
    assert!(mem.iter().all(|ram| (0..ram.len()).step_by(4096).all(|at| !ram.bitmap().dirty_at(at as usize))));

    // The files can be closed, and nothing reaches them.
    let copies = files.each_ref().map(|file| file.try_clone().unwrap());
    drop(files);
    rams[0].discard(0, 25 * PAGE).unwrap();
    assert_is(&mem, &[zeros(0, 25), data(25 * PAGE, 5, 0, 25)]);
    assert!(rams[0].bitmap().dirty_at(0) && !rams[0].bitmap().dirty_at(25 << 12));
    mem.write_slice(&vec![0xff; 683 << 12], GuestAddress(0)).unwrap();
    assert_is(&restore(&regions, &pieces, &copies.each_ref()).unwrap(), &pieces);
}

#[test]
fn scattered_pages_over_a_base_are_one_mapping() {
    const PAGES: u64 = 4000;
    let files = [file(1, PAGES), file(2, PAGES / 20)];
    let pieces: Vec<Piece> = (0..PAGES / 20)
        .flat_map(|n| [data(n * 20 * PAGE, 1, 1, n), data((n * 20 + 1) * PAGE, 19, 0, n * 20 + 1)])
        .collect();
    let mem = restore(&[(GuestAddress(0), PAGES * PAGE)], &pieces, &files.each_ref()).unwrap();
    assert_is(&mem, &pieces);
    assert_eq!(mappings(mem.iter().next().unwrap()), 2, "the first page comes before the mapping");
}

#[test]
fn the_number_of_mappings_is_bounded() {
    // 64 KiB of data and 128 KiB of zeros in turn would be 12 000 mappings.
    const TURNS: u64 = 12_000;
    let one = file(1, 16 * 10);
    let turn = |n: u64| [data(n * 48 * PAGE, 16, 0, n % 10 * 16), zeros((n * 48 + 16) * PAGE, 32)];
    let pieces: Vec<Piece> = (0..TURNS).flat_map(turn).collect();
    let mem = restore(&[(GuestAddress(0), TURNS * 48 * PAGE)], &pieces, &[&one]).unwrap();
    assert!(mappings(mem.iter().next().unwrap()) < 2 * MAX_EXTENTS);
    assert_is(&mem, &pieces[..200]);
    assert_is(&mem, &pieces[pieces.len() - 200..]);
}

#[test]
fn a_random_mix_of_layers_is_restored_page_by_page() {
    let mut seed = 11u64;
    let mut below = |limit: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % limit
    };
    let files: Vec<File> = (1..=4).map(|n| file(n, 2000)).collect();
    for _ in 0..30 {
        let (mut pieces, mut page) = (Vec::new(), 0);
        while page < 1000 {
            let longest = [3, 40][below(2) as usize];
            let count = (1 + below(longest)).min(1000 - page);
            // In part pieces that continue one another, in part from anywhere.
            let from = if below(4) > 0 { page } else { below(1900) };
            pieces.push(match below(6) {
                0 => zeros(page * PAGE, count),
                1..=3 => data(page * PAGE, count, 0, from),
                n => data(page * PAGE, count, n as usize - 2, from),
            });
            page += count;
        }
        assert_is(
            &restore(&[(GuestAddress(0), 1000 * PAGE)], &pieces, &files.iter().collect::<Vec<_>>()).unwrap(),
            &pieces,
        );
    }
}

#[test]
fn short_files_are_refused_before_anything_is_mapped() {
    let files = [file(1, 30)];
    let regions = [(GuestAddress(0), 40 * PAGE)];
    let error = restore(&regions, &[data(0, 31, 0, 0), zeros(31 * PAGE, 9)], &files.each_ref()).unwrap_err();
    assert!(matches!(error, Error::TooShort { file: 0, length: 122_880, needed: 126_976 }), "{error}");
    files[0].set_len(30 * PAGE - 1).unwrap();
    assert!(matches!(restore(&regions, &[data(0, 40, 0, 0)], &files.each_ref()), Err(Error::TooShort { .. })));
}

#[test]
fn pieces_that_do_not_fill_ram_are_refused() {
    let one = file(1, 30);
    let regions = [(GuestAddress(0), 4 * PAGE), (GuestAddress(HIGH), 2 * PAGE)];
    let high = zeros(HIGH, 2);
    let odd = Piece { address: 0, length: 100, source: Source::Zeros };
    let askew = Piece { address: 0, length: 4 * PAGE, source: Source::File { file: 0, offset: 1 } };
    let huge = Piece { address: 0, length: u64::MAX - PAGE + 1, source: Source::Zeros };
    let bad: [&[Piece]; 12] = [
        &[],
        &[zeros(0, 4)],
        &[high, zeros(0, 4)],
        &[zeros(0, 5), high],
        &[zeros(0, 3), high],
        &[zeros(0, 4), zeros(3 * PAGE, 1), high],
        &[zeros(0, 0), zeros(0, 4), high],
        &[odd, high],
        &[askew, high],
        &[huge, high],
        &[data(0, 4, 1, 0), high],
        &[zeros(0, 4), high, zeros(HIGH + 2 * PAGE, 1)],
    ];
    for pieces in bad {
        assert!(matches!(restore(&regions, pieces, &[&one]), Err(Error::Pieces(_))), "{pieces:?}");
    }
    let past = data(0, 4, 0, u64::MAX / PAGE);
    assert!(matches!(restore(&regions, &[past, high], &[&one]), Err(Error::Pieces(_))));
    assert!(restore(&regions, &[zeros(0, 4), high], &[]).is_ok());
}
