//! Codecs of the destination: blocks that a peer sent, as pages.

use lz4_flex::block::{DecompressError, decompress_into};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::limits::ZSTD_WINDOW_LOG_MAX;
use crate::wire::Codec;

/// Unpacks the blocks of one lane.
#[derive(Default)]
pub(super) struct Unpacker {
    /// Frames of one batch.
    alone: Option<DCtx<'static>>,
    /// The frame that goes on; nothing before its first part and behind an error.
    stream: Option<DCtx<'static>>,
}

/// Why a block is no pages.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unpacked {
    /// The codec cannot read it.
    Invalid,
    /// It has so many bytes, or more, and not those of its pages.
    Length(usize),
}

impl Unpacker {
    /// Unpacks `block` into `pages`, whose every byte it has to fill.
    pub(super) fn unpack(&mut self, codec: Codec, block: &[u8], pages: &mut [u8]) -> Result<(), Unpacked> {
        // WHY: a codec's bug must not show a peer's block what an earlier one left here.
        pages.fill(0);
        let expected = pages.len();
        match codec {
            Codec::Lz4 => match decompress_into(block, pages) {
                Ok(got) if got == expected => Ok(()),
                Ok(got) | Err(DecompressError::OutputTooSmall { expected: got, .. }) => Err(Unpacked::Length(got)),
                Err(_) => Err(Unpacked::Invalid),
            },
            Codec::Zstd => {
                let context = created(&mut self.alone)?;
                let got = read(context, block, pages);
                // Also one that ended in the middle leaves nothing for the next.
                let reset = context.reset(ResetDirective::SessionOnly).map_err(|_| Unpacked::Invalid);
                // SPEC: PROTOCOL.md#must-exact-block
                if got?.ended && reset.is_ok() { Ok(()) } else { Err(Unpacked::Invalid) }
            }
            Codec::ZstdStart => {
                let context = created(&mut self.stream)?;
                context.reset(ResetDirective::SessionOnly).map_err(|_| Unpacked::Invalid)?;
                self.go_on(block, pages)
            }
            Codec::ZstdStream => self.go_on(block, pages),
        }
    }

    fn go_on(&mut self, block: &[u8], pages: &mut [u8]) -> Result<(), Unpacked> {
        let mut context = self.stream.take().ok_or(Unpacked::Invalid)?;
        // A frame that ends says nothing of what would follow.
        if read(&mut context, block, pages)?.ended {
            return Err(Unpacked::Invalid);
        }
        // What the decoder would hold back comes out with the next part, where it does not belong.
        let mut more = [0];
        let mut output = OutBuffer::around(more.as_mut_slice());
        context.decompress_stream(&mut output, &mut InBuffer::around(&[])).map_err(|_| Unpacked::Invalid)?;
        if output.pos() > 0 {
            return Err(Unpacked::Length(pages.len() + 1));
        }
        self.stream = Some(context);
        Ok(())
    }

    /// The lane joined again: streams begin anew.
    pub(super) fn restart(&mut self) {
        self.stream = None;
    }
}

struct Read {
    /// The frame is over.
    ended: bool,
}

/// Reads all of `block`, which has to fill `pages` exactly.
fn read(context: &mut DCtx<'static>, block: &[u8], pages: &mut [u8]) -> Result<Read, Unpacked> {
    let expected = pages.len();
    let (mut input, mut output) = (InBuffer::around(block), OutBuffer::around(pages));
    loop {
        let (read, written) = (input.pos(), output.pos());
        let left = context.decompress_stream(&mut output, &mut input).map_err(|_| Unpacked::Invalid)?;
        let done = input.pos() == block.len() && output.pos() == expected;
        if left == 0 || done {
            return if done { Ok(Read { ended: left == 0 }) } else { Err(Unpacked::Length(output.pos())) };
        }
        if (input.pos(), output.pos()) == (read, written) {
            // Neither takes a byte more: the block is too short, or the pages are too few.
            return Err(Unpacked::Length(output.pos()));
        }
    }
}

/// `INVARIANT(window-bound)`: a frame that wants to look back further than both sides have agreed on is refused before its window
/// is allocated.
fn created<'a>(context: &'a mut Option<DCtx<'static>>) -> Result<&'a mut DCtx<'static>, Unpacked> {
    if context.is_none() {
        let mut new = DCtx::try_create().ok_or(Unpacked::Invalid)?;
        new.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX)).map_err(|_| Unpacked::Invalid)?;
        *context = Some(new);
    }
    context.as_mut().ok_or(Unpacked::Invalid)
}
