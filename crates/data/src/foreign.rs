//! What files are that are no data files: told by their first bytes, so that nobody calls them damaged.

/// First bytes, and what a file is that begins with them.
const KINDS: [(&[u8], &str); 29] = [
    (b"version https://git-lfs.github.com/spec/", LFS),
    (
        b"PK\x03\x04",
        "a zip archive; unpack it first (a workbook of Excel is one too: save it as CSV)",
    ),
    (b"\xff\xfe\0\0", "UTF-32; save it as UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32; save it as UTF-8"),
    (b"ARROW1\0\0", ARROW),
    // The first message of a stream.
    (b"\xff\xff\xff\xff", ARROW),
    (b"\xff\xfe", "UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16; save it as UTF-8"),
    (b"\x1f\x8b", "compressed twice; decompress it once"),
    (b"\x28\xb5\x2f\xfd", "compressed twice; decompress it once"),
    (b"BZh", "compressed with bzip2; use gzip or zstd"),
    (b"\xfd7zXZ", "compressed with xz; use gzip or zstd"),
    (b"\x04\x22\x4d\x18", "compressed with lz4; use gzip or zstd"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!\x1a\x07", "a rar archive; unpack it first"),
    (b"FEA1\0\0\0\0", "a Feather file; save it as Parquet or JSON lines"),
    (b"\xd0\xcf\x11\xe0", "a workbook of an old Excel; save it as CSV"),
    (b"ORC\x08", "an ORC file; save it as Parquet or JSON lines"),
    (b"Obj\x01", "an Avro file; save it as Parquet or JSON lines"),
    (b"\x89HDF", "an HDF5 file; save its texts as JSON lines"),
    (b"\x93NUMPY", "an array of NumPy; save its texts as JSON lines"),
    (b"\x80\x02", "a pickle of Python; save its texts as JSON lines"),
    (b"\x80\x03", "a pickle of Python; save its texts as JSON lines"),
    (b"\x80\x04", "a pickle of Python; save its texts as JSON lines"),
    (b"\x80\x05", "a pickle of Python; save its texts as JSON lines"),
    (b"SQLite format 3\0", "a database of SQLite; save a table as CSV or JSON lines"),
    (b"%PDF-", "a PDF; save its text"),
    (b"GGUF\x02\0\0\0", "a model; it is named under `model`"),
    (b"GGUF\x03\0\0\0", "a model; it is named under `model`"),
];

const LFS: &str =
    "a Git LFS pointer: the name of a file that was not downloaded; fetch it with `git lfs pull`";
const ARROW: &str = "an Arrow file, as the `datasets` library caches them; save it as Parquet (`to_parquet`) or JSON lines \
     (`to_json`)";

/// Begins with a page that says why there is no file; plain text may be one.
const PAGES: [&str; 2] = ["<!doctype html", "<html"];

/// What a file is that begins with `head` and whose name ends in `ending`, where that is a kind that is
/// known and not read.
pub(crate) fn kind(head: &[u8], ending: &str) -> Option<&'static str> {
    if let Some((_, what)) = KINDS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(what);
    }
    // A tape archive has its mark behind the first name.
    if head.get(257..262) == Some(b"ustar") {
        return Some("a tar archive; unpack it first");
    }
    let start: Vec<u8> =
        head.iter().copied().skip_while(u8::is_ascii_whitespace).take(16).collect();
    let start = String::from_utf8_lossy(&start).to_lowercase();
    let page = ending != "txt" && PAGES.iter().any(|page| start.starts_with(page));
    page.then_some("a web page, as a download that was refused leaves; fetch the file itself")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_by_their_first_bytes() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
        assert!(kind(pointer, "jsonl").unwrap().contains("Git LFS pointer"));
        assert!(kind(b"ARROW1\0\0", "arrow").unwrap().contains("Arrow"));
        assert!(kind(b"\xff\xff\xff\xff\x10\0\0\0", "arrow").unwrap().contains("Arrow"));
        assert!(kind(b"\n<!DOCTYPE html>\n<html>", "json").unwrap().contains("web page"));
        assert_eq!(kind(b"<!DOCTYPE html>", "txt"), None);
        let mut tar = vec![b'a'; 257];
        tar.extend(b"ustar\x0000");
        assert!(kind(&tar, "").unwrap().contains("tar archive"));
        assert!(kind(b"\x80\x02}q\0", "").unwrap().contains("pickle"));
        assert!(kind(b"\xd0\xcf\x11\xe0\xa1\xb1", "xls").unwrap().contains("Excel"));
        for text in [
            &b"{\"text\": 1}"[..],
            b"text\n",
            b"PAR1",
            b"",
            b"[1]",
            b"Objective: none",
            b"ORCID,name",
            b"PARENT,child",
            b"GGUF is a format",
            b"ARROW1,ARROW2",
        ] {
            assert_eq!(kind(text, "csv"), None);
        }
    }
}
