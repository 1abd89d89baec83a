//! The header that begins every packet of the rx and tx queues (virtio 1.2 section 5.10.6).

/// What a packet means, `virtio_vsock_hdr.op`.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends one at once.
    pub const RST: u16 = 3;
    /// Ends one or both directions, see [`super::shutdown`].
    pub const SHUTDOWN: u16 = 4;
    /// Carries bytes.
    pub const RW: u16 = 5;
    /// Tells how much the sender can take.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a `CREDIT_UPDATE`.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// The flags of a `SHUTDOWN`.
pub mod shutdown {
    /// The sender of the packet receives no more.
    pub const RCV: u32 = 1;
    /// The sender of the packet sends no more.
    pub const SEND: u32 = 2;
    /// Neither.
    pub const BOTH: u32 = RCV | SEND;
}

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only kind of socket here.
pub const STREAM: u16 = 1;

/// The well-known address of the host.
pub const HOST_CID: u64 = 2;

/// `struct virtio_vsock_hdr`, all fields little endian on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// The kind of socket, [`STREAM`].
    pub kind: u16,
    /// See [`op`].
    pub op: u16,
    pub flags: u32,
    /// The size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// How many bytes the sender has taken out of that buffer since the beginning, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Its length on the wire.
    pub const SIZE: usize = 44;

    /// Reads a header from the wire; every pattern of bytes is one.
    pub fn from_bytes(bytes: &[u8; Header::SIZE]) -> Header {
        let mut wire = Wire(bytes);
        Header {
            src_cid: u64::from_le_bytes(wire.take()),
            dst_cid: u64::from_le_bytes(wire.take()),
            src_port: u32::from_le_bytes(wire.take()),
            dst_port: u32::from_le_bytes(wire.take()),
            len: u32::from_le_bytes(wire.take()),
            kind: u16::from_le_bytes(wire.take()),
            op: u16::from_le_bytes(wire.take()),
            flags: u32::from_le_bytes(wire.take()),
            buf_alloc: u32::from_le_bytes(wire.take()),
            fwd_cnt: u32::from_le_bytes(wire.take()),
        }
    }

    /// The header as it goes on the wire.
    pub fn to_bytes(self) -> [u8; Header::SIZE] {
        let mut bytes = [0; Header::SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The refusal of this packet, sent back to where it came from.
    pub fn refusal(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            // Section 5.10.6.5: also a packet of an unknown type is answered in its own type.
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

/// What is left to read of a header.
struct Wire<'a>(&'a [u8]);

impl Wire<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_at(N);
        self.0 = rest;
        field.try_into().expect("split_at gave N bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_lies_on_the_wire_as_the_specification_draws_it() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1111_2222,
            dst_port: 1024,
            len: 7,
            kind: STREAM,
            op: op::RW,
            flags: shutdown::BOTH,
            buf_alloc: 0x4_0000,
            fwd_cnt: 0xFFFF_FFFE,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!(bytes[..9], [8, 7, 6, 5, 4, 3, 2, 1, 2]);
        assert_eq!(bytes[16..34], [0x22, 0x22, 0x11, 0x11, 0, 4, 0, 0, 7, 0, 0, 0, 1, 0, 5, 0, 3, 0]);
        assert_eq!(bytes[36..], [0, 0, 4, 0, 0xFE, 0xFF, 0xFF, 0xFF]);
    }
}
