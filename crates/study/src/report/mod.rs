//! The report of one study or of several: a page, Markdown, pictures, tables of all cells.

pub mod analysis;
mod chart;
mod figures;
mod page;
pub mod weights;
mod words;

use crate::columns::{self, Column};
use crate::disk::{make_folder, write_file};
use crate::error::{Error, Result};
use analysis::Analysis;
use figures::{Figure, Table};
use page::Part;
use resvg::{tiny_skia, usvg};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a report left.
#[derive(Clone, Debug)]
pub struct Written {
    /// The page.
    pub page: PathBuf,
    /// The Markdown file.
    pub markdown: PathBuf,
    /// Pictures, of each an SVG and a CSV file.
    pub figures: usize,
    /// Why there are no PNG files; none if there are.
    pub without_png: Option<String>,
    /// What was found, in sentences.
    pub findings: Vec<String>,
}

/// How far a study is, in a line.
pub fn progress(analysis: &Analysis) -> String {
    page::progress(analysis)
}

/// Writes `report.html`, `report.md`, `figures/`, `results.csv` and `results.parquet` into `folder`.
///
/// # Errors
/// If they cannot be written.
pub fn write(title: &str, studies: &[Analysis], folder: &Path) -> Result<Written> {
    let several = studies.len() > 1;
    make_folder(folder)?;
    let all: Vec<Vec<Figure>> = studies.iter().map(figures::figures).collect();
    let painter = Painter::new();
    let mut folders = Vec::new();
    for (analysis, figures) in studies.iter().zip(&all) {
        let name = match several {
            true => format!("figures/{}", analysis.plan.name),
            false => "figures".to_owned(),
        };
        let place = folder.join(&name);
        make_folder(&place)?;
        for figure in figures {
            let file = |ending: &str| place.join(format!("{}.{ending}", figure.name));
            write_file(&file("svg"), figure.drawing.file(&figure.title).as_bytes())?;
            write_file(&file("csv"), &csv(&figure.table)?)?;
            if let Ok(painter) = &painter {
                write_file(&file("png"), &painter.png(&figure.drawing.plain(&figure.title))?)?;
            }
        }
        folders.push(name);
    }
    let parts: Vec<Part<'_>> = studies
        .iter()
        .zip(&all)
        .zip(&folders)
        .map(|((analysis, figures), folder)| Part {
            analysis,
            figures,
            folder,
            pngs: painter.is_ok(),
        })
        .collect();
    let (page, markdown) = (folder.join("report.html"), folder.join("report.md"));
    write_file(&page, page::html(title, &parts).as_bytes())?;
    write_file(&markdown, page::markdown(title, &parts).as_bytes())?;
    let columns: Vec<Column> = columns::of(studies);
    write_file(&folder.join("results.csv"), &columns::csv(&columns)?)?;
    write_file(&folder.join("results.parquet"), &columns::parquet(&columns)?)?;
    Ok(Written {
        page,
        markdown,
        figures: all.iter().map(Vec::len).sum(),
        without_png: painter.err(),
        findings: studies.iter().flat_map(words::findings).collect(),
    })
}

fn csv(table: &Table) -> Result<Vec<u8>> {
    let failed = |error: csv::Error| Error::Failed(error.to_string());
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(&table.header).map_err(failed)?;
    for row in &table.rows {
        writer.write_record(row).map_err(failed)?;
    }
    writer.into_inner().map_err(|error| Error::Failed(error.to_string()))
}

/// Turns pictures into pixels.
struct Painter {
    options: usvg::Options<'static>,
}

/// Pixels of a picture's unit.
const SCALE: f32 = 2.0;

impl Painter {
    /// With the system's fonts; or the reason why there are none.
    fn new() -> std::result::Result<Self, String> {
        let mut fonts = usvg::fontdb::Database::new();
        fonts.load_system_fonts();
        let family = ["DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial", "Helvetica"];
        let has = |name: &&&str| {
            let query = usvg::fontdb::Query {
                families: &[usvg::fontdb::Family::Name(name)],
                ..usvg::fontdb::Query::default()
            };
            fonts.query(&query).is_some()
        };
        let known = family.iter().find(has).map(|&name| name.to_owned());
        let first =
            || fonts.faces().next().and_then(|face| face.families.first()).map(|f| f.0.clone());
        let Some(family) = known.or_else(first) else {
            return Err(
                "this machine has no font to write into PNG files; the SVG files are there".into(),
            );
        };
        fonts.set_sans_serif_family(&family);
        let options = usvg::Options {
            font_family: family,
            fontdb: Arc::new(fonts),
            ..usvg::Options::default()
        };
        Ok(Self { options })
    }

    fn png(&self, svg: &str) -> Result<Vec<u8>> {
        let failed =
            |message: String| Error::Failed(format!("a picture cannot be drawn: {message}"));
        let tree =
            usvg::Tree::from_str(svg, &self.options).map_err(|error| failed(error.to_string()))?;
        let size = tree.size();
        let side = |length: f32| (length * SCALE).ceil() as u32;
        let mut pixels = tiny_skia::Pixmap::new(side(size.width()), side(size.height()))
            .ok_or_else(|| failed("it has no size".to_owned()))?;
        let transform = tiny_skia::Transform::from_scale(SCALE, SCALE);
        resvg::render(&tree, transform, &mut pixels.as_mut());
        pixels.encode_png().map_err(|error| failed(error.to_string()))
    }
}
