//! Names of GGML's number formats, also of those that cannot be read.

/// GGML's type numbers and their names, those no longer written included.
const NAMES: &[(u32, &str)] = &[
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (4, "Q4_2"),
    (5, "Q4_3"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];

/// What to call the format with GGML's type number `id`: its name, or the number if GGML has none.
pub(super) fn name(id: u32) -> String {
    match NAMES.iter().find(|(known, _)| *known == id) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("number {id}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::SUPPORTED_FORMATS;
    use hydralora_kernels::block::BlockFormat;

    #[test]
    fn what_can_be_read_has_ggml_s_name_and_is_listed() {
        let listed: Vec<&str> = SUPPORTED_FORMATS.split([',', ' ']).collect();
        for (at, &(id, known)) in NAMES.iter().enumerate() {
            assert_eq!(at, id as usize);
            let format = BlockFormat::from_ggml(id).map(|format| format.to_string());
            assert_eq!(format.is_some(), listed.contains(&known), "{known}");
            assert!(format.is_none_or(|format| format == known), "{known}");
        }
        for id in NAMES.len() as u32..300 {
            assert_eq!(BlockFormat::from_ggml(id), None);
        }
        assert_eq!(name(16), "IQ2_XXS");
        assert_eq!(name(4711), "number 4711");
    }
}
