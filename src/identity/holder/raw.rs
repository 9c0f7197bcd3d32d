//! What tokens say in their own form, and others in another.

/// A public key of Ed25519: 32 bytes, within an OCTET STRING (PKCS#11 2.40) or as they are (3.0).
pub(super) fn ed25519_half(point: &[u8]) -> Option<&[u8]> {
    let half = point.strip_prefix(&[0x04, 32]).unwrap_or(point);
    (half.len() == 32).then_some(half)
}

/// An ECDSA signature as TLS has it, from two numbers of one length as PKCS#11 has them.
pub(super) fn ecdsa_der(raw: &[u8]) -> Option<Vec<u8>> {
    if !matches!(raw.len(), 64 | 96) {
        return None;
    }
    let (r, s) = raw.split_at(raw.len() / 2);
    let body = [integer(r)?, integer(s)?].concat();
    // At most 2 × 51 bytes: the short form of a length.
    Some([&[0x30, u8::try_from(body.len()).ok()?], body.as_slice()].concat())
}

fn integer(number: &[u8]) -> Option<Vec<u8>> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count().min(number.len().saturating_sub(1));
    let digits = number.get(zeros..).unwrap_or(number);
    // Positive, so its first bit is none of the number's.
    let sign: &[u8] = if digits.first().is_some_and(|first| *first >= 0x80) { &[0] } else { &[] };
    let length = u8::try_from(sign.len().saturating_add(digits.len())).ok()?;
    Some([&[0x02, length], sign, digits].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_halves_are_taken_as_either_standard_has_them() {
        assert_eq!(ed25519_half(&[7; 32]), Some([7; 32].as_slice()));
        assert_eq!(ed25519_half(&[&[0x04, 32], [7; 32].as_slice()].concat()), Some([7; 32].as_slice()));
        for other in [&[][..], &[0x04, 32], &[7; 31], &[7; 65], &[0x04; 34], &[0x03; 34]] {
            assert_eq!(ed25519_half(other), None, "{other:?}");
        }
    }

    #[test]
    fn ecdsa_signatures_are_written_as_tls_has_them() {
        let mut raw = [0; 64];
        raw[0] = 0x80;
        raw[63] = 7;
        let der = ecdsa_der(&raw).unwrap();
        assert_eq!(der[..5], [0x30, 38, 0x02, 33, 0]);
        assert_eq!(der[5..7], [0x80, 0]);
        assert_eq!(der[der.len() - 3..], [0x02, 1, 7]);
        assert_eq!(ecdsa_der(&[0; 64]).unwrap(), [0x30, 6, 2, 1, 0, 2, 1, 0]);
        assert!(ecdsa_der(&[0; 63]).is_none() && ecdsa_der(&[]).is_none() && ecdsa_der(&[0xff; 128]).is_none());
        assert_eq!(ecdsa_der(&[0xff; 96]).unwrap().len(), 2 + 2 * 51);
    }
}
