//! Values of options, read as docker reads them.

/// A number of bytes with an optional binary unit: `512m`, `1.5g`, `2GiB`, `1073741824`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: try 512M or 2G");
    let end = text.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(text.len());
    let shift = match text[end..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let digits = text[..end].trim_end();
    if let Ok(number) = digits.parse::<u64>() {
        return number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"));
    }
    if !digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return Err(wrong());
    }
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    #[expect(clippy::cast_precision_loss, reason = "a fraction of a size is an approximation anyway")]
    let bytes = number * (1_u64 << shift) as f64;
    if bytes < 9e18 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is positive and in range"
        )]
        return Ok(bytes as u64);
    }
    Err(format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_docker_reads_them() {
        assert_eq!(size("512m"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("1.5g"), Ok(3 << 29));
        assert_eq!(size("7"), Ok(7));
        for bad in
            ["", "G", "-1", "1x", "1.2.3g", "inf", "1e3", "99999999999999999999", "18446744073709551615k"]
        {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
