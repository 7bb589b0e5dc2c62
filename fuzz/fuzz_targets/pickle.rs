//! A file of `torch.save`: the zip around it, and the program and storages inside.
//!
//! Bytes that do not start as a zip file are taken for the program alone and packed with storages of
//! a few sizes, for a zip's checksums would keep almost every other input out.
#![no_main]

use hydralora_fuzz::{parts, with_files};
use hydralora_kernels::DType;
use hydralora_peft::exchange::pickle;
use libfuzzer_sys::fuzz_target;

const NAME: &str = "adapter_model.bin";

fuzz_target!(|data: &[u8]| {
    let packed;
    let file = if data.starts_with(b"PK") {
        data
    } else {
        packed = pack(data);
        &packed
    };
    with_files(file, &[NAME], |folder| {
        let _ = pickle::read(&folder.join(NAME), DType::F32);
    });
});

/// A zip file of uncompressed entries: the program, and after it the storages `0`, `1`, ….
fn pack(data: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut directory = Vec::new();
    let mut entries: u16 = 0;
    for part in parts(data, 5) {
        let name = match entries {
            0 => "m/data.pkl".to_owned(),
            _ => format!("m/data/{}", entries - 1),
        };
        let mut common = vec![0; 10];
        common.extend(crc32(part).to_le_bytes());
        common.extend((part.len() as u32).to_le_bytes());
        common.extend((part.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        directory.extend(b"PK\x01\x02\x14\x00\x14\x00");
        directory.extend(&common[2..]);
        directory.extend([0; 10]);
        directory.extend((file.len() as u32).to_le_bytes());
        directory.extend(name.as_bytes());
        file.extend(b"PK\x03\x04\x14\x00");
        file.extend(&common[2..]);
        file.extend(name.as_bytes());
        file.extend(part);
        entries += 1;
    }
    let start = file.len() as u32;
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend(entries.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 }
        })
    })
}
