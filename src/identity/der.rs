//! How certificates and CRLs are written, where parsers take more than DER and RFC 5280 have: what can be written in two ways could be
//! read in two.

/// A BOOLEAN that says FALSE.
pub(super) const FALSE: &[u8] = &[1, 1, 0];

const GENERALIZED_TIME: u8 = 0x18;
const CONSTRUCTED: u8 = 0x20;
/// LIMIT: X.509 nests 7 deep outside of extensions' values.
const DEPTH_MAX: u8 = 12;

/// The contents of the first element, and what stands behind it; nothing where its length is written otherwise than DER wants it.
pub(super) fn split(element: &[u8]) -> Option<(&[u8], &[u8])> {
    let (first, rest) = element.get(1..)?.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(*first), rest),
        0x81 => rest.split_first().filter(|(length, _)| **length > 0x7f).map(|(length, rest)| (usize::from(*length), rest))?,
        0x82 => {
            rest.split_first_chunk().filter(|([high, _], _)| *high > 0).map(|(length, rest)| (u16::from_be_bytes(*length).into(), rest))?
        }
        0x83 => {
            let ([high, middle, low], rest) = rest.split_first_chunk::<3>().filter(|([high, ..], _)| *high > 0)?;
            (usize::try_from(u32::from_be_bytes([0, *high, *middle, *low])).ok()?, rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

/// Looks at everything but the values of extensions: lengths are shortest; nothing says FALSE, which is what every BOOLEAN of RFC 5280 is
/// without a word (X.690 section 11.5); and no time before 2050 is a GeneralizedTime (sections 4.1.2.5 and 5.1.2.4).
pub(super) fn check(elements: &[u8]) -> Result<(), &'static str> {
    walk(elements, DEPTH_MAX)
}

fn walk(mut elements: &[u8], depth: u8) -> Result<(), &'static str> {
    let deeper = depth.checked_sub(1).ok_or("DER: it is nested too deep")?;
    while let Some(tag) = elements.first() {
        let (contents, behind) = split(elements).ok_or("DER: a length")?;
        if elements.starts_with(FALSE) {
            return Err("DER: FALSE is written out");
        }
        if *tag == GENERALIZED_TIME && contents < b"2050".as_slice() {
            return Err("a date before 2050 is no UTCTime");
        }
        if tag & CONSTRUCTED != 0 {
            walk(contents, deeper)?;
        }
        elements = behind;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_read_in_their_one_form() {
        for bytes in [0_usize, 1, 127, 128, 255, 256, 65_535, 65_536, 1 << 23] {
            let length: Vec<u8> = bytes.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect();
            let short = if bytes < 128 {
                vec![u8::try_from(bytes).unwrap()]
            } else {
                [vec![0x80 | u8::try_from(length.len()).unwrap()], length.clone()].concat()
            };
            let written = |length: &[u8]| [&[4], length, vec![7; bytes].as_slice(), b"behind"].concat();
            assert_eq!(split(&written(&short)).map(|(contents, behind)| (contents.len(), behind)), Some((bytes, b"behind".as_slice())));
            // One byte more of it says the same.
            let longer = [vec![0x81 + u8::try_from(length.len()).unwrap(), 0], length].concat();
            assert_eq!(split(&written(&longer)), None, "{bytes}");
        }
        for wrong in [&[][..], &[4], &[4, 1], &[4, 0x80, 0, 0], &[4, 0x81], &[4, 0x83, 1, 0], &[4, 0x84, 1, 0, 0, 0]] {
            assert_eq!(split(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_nested_without_an_end_is_refused() {
        let mut nested = Vec::new();
        for depth in 0..40 {
            nested = [vec![0x30, u8::try_from(nested.len()).unwrap()], nested].concat();
            assert_eq!(check(&nested).is_ok(), depth < usize::from(DEPTH_MAX) - 1, "{depth}");
        }
    }
}
