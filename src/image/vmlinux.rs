//! Taking the kernel out of a bzImage, so that no guest has to unpack it at every boot.
//!
//! A bzImage is a small program with the compressed kernel, an ELF file, as its payload; its setup header
//! (the kernel's `Documentation/arch/x86/boot.rst`) says where. The ELF runs at the address that it was
//! linked for.

use std::io::Read;

/// The largest kernel, unpacked. Distributions' have about 50 MiB.
const MAX_KERNEL: usize = 512 << 20;
/// The blocks of lz4's legacy frame are made of this many bytes each, the last of fewer.
const LZ4_BLOCK: usize = 8 << 20;

/// Gives the kernel inside the image, or the image itself when its payload is packed in a way that we do not
/// know: that boots too, only later.
pub fn unpack(image: Vec<u8>) -> Result<Vec<u8>, String> {
    if elf_length(&image).is_some() {
        return Ok(image);
    }
    let payload = payload(&image)?;
    let unpacked = match payload {
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4_legacy(blocks)?,
        // All three: what follows the end of the packed kernel, such as its length, is left alone.
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::stream::read::Decoder::new(payload).map_err(|error| error.to_string())?;
            bounded(decoder.single_frame())?
        }
        _ => return Ok(image),
    };
    let length = elf_length(&unpacked).ok_or("what is packed in it is not an x86-64 kernel")?;
    let mut kernel = unpacked;
    kernel.truncate(length);
    trim(&mut kernel);
    Ok(kernel)
}

/// Cuts the zeros off the ends of segments, and the section table, which no loader needs. Memory is zero
/// before a kernel is loaded, and Debian's has 12 MiB of zeros that would be copied at every boot.
fn trim(kernel: &mut Vec<u8>) {
    let u64_at = |kernel: &[u8], at: usize| Some(u64::from_le_bytes(*kernel.get(at..)?.first_chunk()?));
    let u16_at = |kernel: &[u8], at: usize| Some(u16::from_le_bytes(*kernel.get(at..)?.first_chunk()?));
    let (Some(table), Some(size), Some(count)) = (u64_at(kernel, 32), u16_at(kernel, 54), u16_at(kernel, 56)) else {
        return;
    };
    let mut end = table as usize + usize::from(size) * usize::from(count);
    for header in (0..usize::from(count)).map(|index| table as usize + index * usize::from(size)) {
        let (Some(start), Some(length)) = (u64_at(kernel, header + 8), u64_at(kernel, header + 32)) else { return };
        let Some(segment) = kernel.get(start as usize..).and_then(|rest| rest.get(..length as usize)) else { return };
        let used = segment.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        kernel[header + 32..header + 40].copy_from_slice(&(used as u64).to_le_bytes());
        end = end.max(start as usize + used);
    }
    // e_shoff, e_shnum and e_shstrndx: there are no sections.
    kernel[40..48].fill(0);
    kernel[60..64].fill(0);
    kernel.truncate(end);
}

/// The payload of a bzImage, by its setup header.
fn payload(image: &[u8]) -> Result<&[u8], String> {
    let u16_at = |at: usize| image.get(at..at + 2).map(|field| u16::from_le_bytes([field[0], field[1]]));
    let u32_at = |at: usize| Some(u32::from(u16_at(at)?) | u32::from(u16_at(at + 2)?) << 16);
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("it is not a bzImage".into());
    }
    let cut_off = || "it is cut off".to_string();
    // The fields of the payload came with version 2.08 of the protocol.
    if u16_at(0x206).ok_or_else(cut_off)? < 0x208 {
        return Err("its boot protocol is older than 2.08".into());
    }
    // Zero stands for four, by the protocol, for very old boot loaders.
    let setup = match image.get(0x1f1).copied().ok_or_else(cut_off)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let offset = u32_at(0x248).ok_or_else(cut_off)? as usize;
    let length = u32_at(0x24c).ok_or_else(cut_off)? as usize;
    let start = (setup + 1) * 512 + offset;
    image.get(start..).and_then(|rest| rest.get(..length)).ok_or_else(cut_off)
}

/// lz4's legacy frame: blocks, each behind its packed length, until the end or what cannot be a length.
fn lz4_legacy(mut rest: &[u8]) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((length, behind)) = rest.split_first_chunk::<4>() {
        // The kernel's build adds the unpacked length behind the last block; it is the only thing left then.
        let Some((packed, behind)) = behind.split_at_checked(u32::from_le_bytes(*length) as usize) else { break };
        let made = lz4_flex::block::decompress_into(packed, &mut block).map_err(|error| error.to_string())?;
        if unpacked.len() + made > MAX_KERNEL {
            return Err(format!("it unpacks to more than {MAX_KERNEL} bytes"));
        }
        unpacked.extend_from_slice(&block[..made]);
        rest = behind;
    }
    Ok(unpacked)
}

fn bounded(from: impl Read) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    from.take(MAX_KERNEL as u64 + 1).read_to_end(&mut unpacked).map_err(|error| error.to_string())?;
    match unpacked.len() > MAX_KERNEL {
        true => Err(format!("it unpacks to more than {MAX_KERNEL} bytes")),
        false => Ok(unpacked),
    }
}

/// Where an x86-64 ELF file ends by its own tables, if it is one. Behind a kernel's lies what only a kernel
/// needs that is moved when it is loaded.
fn elf_length(file: &[u8]) -> Option<usize> {
    let field = |at: usize, width: usize| {
        let bytes = file.get(at..at.checked_add(width)?)?;
        let value = bytes.iter().rev().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    // 64 bits, little endian, for the machine 62 (x86-64).
    if file.get(..6) != Some(b"\x7fELF\x02\x01") || field(18, 2)? != 62 {
        return None;
    }
    let (segments, sections) =
        ((field(32, 8)?, field(54, 2)?, field(56, 2)?), (field(40, 8)?, field(58, 2)?, field(60, 2)?));
    let table_end = |(at, size, count): (usize, usize, usize)| at.checked_add(size.checked_mul(count)?);
    let mut end = table_end(segments)?.max(table_end(sections)?);
    for i in 0..segments.2 {
        let header = segments.0 + i * segments.1;
        end = end.max(field(header + 8, 8)?.checked_add(field(header + 32, 8)?)?);
    }
    Some(end).filter(|end| *end <= file.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with one segment of `size` bytes behind its headers.
    fn elf(size: usize) -> Vec<u8> {
        let mut file = vec![0; 120];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64; // segments' table at,
        file[54] = 56; // with entries of,
        file[56] = 1; // so many
        file[64 + 8] = 120; // the segment is at,
        file[64 + 32..][..8].copy_from_slice(&size.to_le_bytes()); // with so many bytes
        file.extend((0..size).map(|i| (i / 100) as u8));
        file
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248] = 16;
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    fn lz4(content: &[u8]) -> Vec<u8> {
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for block in content.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed.extend((content.len() as u32).to_le_bytes());
        packed
    }

    #[test]
    fn zeros_at_the_end_of_a_segment_are_for_memory_and_not_for_the_file() {
        let mut kernel = elf(1000);
        kernel[120 + 600..].fill(0);
        kernel.extend([7; 50]); // sections
        trim(&mut kernel);
        assert_eq!(kernel.len(), 120 + 600);
        assert_eq!(kernel[64 + 32..][..8], 600u64.to_le_bytes());
        assert_eq!(elf_length(&kernel), Some(120 + 600));
    }

    #[test]
    fn kernels_are_unpacked_and_what_lies_behind_them_is_cut() {
        let kernel = elf(9 << 20);
        let with_relocations = [&kernel[..], &[7; 1000]].concat();
        let zstd = [zstd::bulk::compress(&with_relocations, 1).unwrap(), vec![1, 2, 3, 4]].concat();
        for payload in [lz4(&with_relocations), zstd] {
            assert!(unpack(bzimage(&payload)).unwrap() == kernel);
        }
        assert!(unpack(kernel.clone()).unwrap() == kernel);
        let unknown = bzimage(b"\xfd7zXZ and so on");
        assert_eq!(unpack(unknown.clone()).unwrap(), unknown);
    }

    #[test]
    fn what_is_no_kernel_or_is_cut_off_is_refused() {
        let good = bzimage(&lz4(&elf(1 << 16)));
        for length in [0, 0x1f0, 0x202, 0x207, 0x24f, 1030, good.len() - 1] {
            assert!(unpack(good[..length].to_vec()).is_err(), "{length}");
        }
        assert!(unpack(bzimage(&lz4(b"not a kernel"))).is_err());
        let mut old = good.clone();
        old[0x206] = 7;
        assert!(unpack(old).is_err());
        // Any damage is an error or a kernel with other content, and never a crash.
        for at in 0..good.len().min(4096) {
            let mut damaged = good.clone();
            damaged[at] ^= 0xff;
            let _ = unpack(damaged);
        }
        let mut loud = elf(1 << 10);
        loud[56] = 0xff;
        loud[57] = 0xff;
        assert!(elf_length(&loud).is_none());
    }
}
