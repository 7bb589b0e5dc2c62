//! All cells as a table: `results.csv` and `results.parquet`.

use crate::error::{Error, Result};
use crate::report::analysis::Analysis;
use crate::result::CellResult;
use crate::store::Kind;
use parquet::basic::{Compression, LogicalType, Repetition, Type as PhysicalType};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

/// A cell of a study: the study, the cell's number, whether it was chosen.
type Row<'a> = (&'a Analysis, usize, bool);

/// The values of a column; none where there is nothing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Values {
    Text(Vec<Option<String>>),
    Number(Vec<Option<f64>>),
    Whole(Vec<Option<i64>>),
    Flag(Vec<Option<bool>>),
}

/// A named column.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) values: Values,
}

/// Metrics of training that every row has, in this order.
const METRICS: [&str; 9] = [
    "valid_loss",
    "base_loss",
    "parameters",
    "steps",
    "tokens",
    "wall_s",
    "cpu_s",
    "peak_rss_mb",
    "energy_j",
];

/// One row a point of a plan, of all studies.
pub(crate) fn of(studies: &[Analysis]) -> Vec<Column> {
    let mut axes: Vec<&str> = Vec::new();
    let mut metrics: BTreeSet<String> = BTreeSet::new();
    for study in studies {
        for (axis, _) in &study.plan.axes {
            if !axes.contains(&axis.as_str()) {
                axes.push(axis);
            }
        }
        for result in study.results.values() {
            metrics.extend(result.test_metrics().into_keys());
            metrics.extend(result.weight_metrics());
            let valid = result.trained.as_ref().and_then(|trained| trained.valid.as_ref());
            let domains = valid.into_iter().flat_map(|losses| losses.domains.keys());
            metrics.extend(domains.map(|domain| format!("valid_loss/{domain}")));
        }
    }
    let mut rows: Vec<(&Analysis, usize, bool)> = Vec::new();
    for study in studies {
        let chosen: HashSet<usize> = study
            .choices
            .iter()
            .filter_map(|choice| choice.chosen())
            .flat_map(|tried| tried.cells.iter().copied())
            .collect();
        rows.extend(
            (0..study.plan.cells.len()).map(|index| (study, index, chosen.contains(&index))),
        );
    }
    let result =
        |(study, index, _): &Row<'_>| study.results.get(&study.plan.cells[*index].id).cloned();
    let results: Vec<Option<CellResult>> = rows.iter().map(result).collect();
    let cell = |row: &Row<'_>| row.0.plan.cells[row.1].clone();
    let text = |name: &str, pick: &dyn Fn(&Row<'_>) -> Option<String>| Column {
        name: name.to_owned(),
        values: Values::Text(rows.iter().map(pick).collect()),
    };
    let status = |row: &Row<'_>| {
        let id = &row.0.plan.cells[row.1].id;
        Some(match (row.0.results.get(id), row.0.failures.contains_key(id)) {
            (_, true) => "failed".to_owned(),
            (Some(result), _) if result.test.is_some() => "scored".to_owned(),
            (Some(_), _) => "trained".to_owned(),
            (None, _) => "open".to_owned(),
        })
    };
    let kind = |row: &Row<'_>| {
        Some(match cell(row).kind {
            Kind::Trained => "trained".to_owned(),
            Kind::Untrained => "untrained".to_owned(),
            Kind::Combined => "combined".to_owned(),
        })
    };
    let mut columns = vec![
        text("study", &|row| Some(row.0.plan.name.clone())),
        text("cell", &|row| Some(cell(row).id)),
        text("kind", &kind),
        text("status", &status),
        Column {
            name: "chosen".to_owned(),
            values: Values::Flag(rows.iter().map(|row| Some(row.2)).collect()),
        },
        Column {
            name: "seed".to_owned(),
            values: Values::Whole(
                rows.iter().map(|row| cell(row).seed.map(|seed| seed as i64)).collect(),
            ),
        },
    ];
    for axis in axes {
        columns.push(text(&format!("axis_{axis}"), &|row| cell(row).labels.get(axis).cloned()));
    }
    for metric in METRICS.into_iter().chain(metrics.iter().map(String::as_str)) {
        let value = |result: &Option<CellResult>| result.as_ref()?.metric(metric);
        columns.push(Column {
            name: metric.to_owned(),
            values: Values::Number(results.iter().map(value).collect()),
        });
    }
    // Beside the joules, so that a guess is none of a meter's.
    let source =
        |result: &Option<CellResult>| result.as_ref()?.trained.as_ref()?.energy.source.clone();
    columns.push(Column {
        name: "energy_source".to_owned(),
        values: Values::Text(results.iter().map(source).collect()),
    });
    columns
}

fn len(columns: &[Column]) -> usize {
    columns.first().map_or(0, |column| match &column.values {
        Values::Text(values) => values.len(),
        Values::Number(values) => values.len(),
        Values::Whole(values) => values.len(),
        Values::Flag(values) => values.len(),
    })
}

/// The columns as CSV, what is not there left empty.
pub(crate) fn csv(columns: &[Column]) -> Result<Vec<u8>> {
    fn shown<T: ToString>(value: Option<&Option<T>>) -> String {
        value.and_then(Option::as_ref).map_or(String::new(), T::to_string)
    }
    let failed = |error: csv::Error| Error::Failed(error.to_string());
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(columns.iter().map(|column| &column.name)).map_err(failed)?;
    for row in 0..len(columns) {
        let cell = |column: &Column| match &column.values {
            Values::Text(values) => shown(values.get(row)),
            Values::Number(values) => shown(values.get(row)),
            Values::Whole(values) => shown(values.get(row)),
            Values::Flag(values) => shown(values.get(row)),
        };
        writer.write_record(columns.iter().map(cell)).map_err(failed)?;
    }
    writer.into_inner().map_err(|error| Error::Failed(error.to_string()))
}

/// The columns as a Parquet file.
pub(crate) fn parquet(columns: &[Column]) -> Result<Vec<u8>> {
    written(columns).map_err(|error| Error::Failed(format!("results.parquet: {error}")))
}

fn written(columns: &[Column]) -> parquet::errors::Result<Vec<u8>> {
    let field = |column: &Column| {
        let (physical, logical) = match column.values {
            Values::Text(_) => (PhysicalType::BYTE_ARRAY, Some(LogicalType::String)),
            Values::Number(_) => (PhysicalType::DOUBLE, None),
            Values::Whole(_) => (PhysicalType::INT64, None),
            Values::Flag(_) => (PhysicalType::BOOLEAN, None),
        };
        Type::primitive_type_builder(&column.name, physical)
            .with_repetition(Repetition::OPTIONAL)
            .with_logical_type(logical)
            .build()
            .map(Arc::new)
    };
    let fields = columns.iter().map(field).collect::<parquet::errors::Result<Vec<_>>>()?;
    let schema = Arc::new(Type::group_type_builder("cell").with_fields(fields).build()?);
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    fn levels<T>(values: &[Option<T>]) -> Vec<i16> {
        values.iter().map(|value| i16::from(value.is_some())).collect()
    }
    for column in columns {
        let Some(mut out) = group.next_column()? else { break };
        match &column.values {
            Values::Text(values) => {
                let present: Vec<ByteArray> =
                    values.iter().flatten().map(|text| ByteArray::from(text.as_str())).collect();
                out.typed::<ByteArrayType>().write_batch(&present, Some(&levels(values)), None)?;
            }
            Values::Number(values) => {
                let present: Vec<f64> = values.iter().flatten().copied().collect();
                out.typed::<DoubleType>().write_batch(&present, Some(&levels(values)), None)?;
            }
            Values::Whole(values) => {
                let present: Vec<i64> = values.iter().flatten().copied().collect();
                out.typed::<Int64Type>().write_batch(&present, Some(&levels(values)), None)?;
            }
            Values::Flag(values) => {
                let present: Vec<bool> = values.iter().flatten().copied().collect();
                out.typed::<BoolType>().write_batch(&present, Some(&levels(values)), None)?;
            }
        }
        out.close()?;
    }
    group.close()?;
    writer.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::file::reader::{FileReader, SerializedFileReader};

    #[test]
    fn both_tables_hold_what_was_given() {
        let columns = vec![
            Column {
                name: "a".into(),
                values: Values::Text(vec![Some("x, \"y\"".into()), None, Some("z".into())]),
            },
            Column {
                name: "loss/law".into(),
                values: Values::Number(vec![None, Some(0.1), Some(-2.0)]),
            },
            Column { name: "seed".into(), values: Values::Whole(vec![Some(1), Some(2), None]) },
            Column {
                name: "chosen".into(),
                values: Values::Flag(vec![Some(true), None, Some(false)]),
            },
        ];
        let text = String::from_utf8(csv(&columns).unwrap()).unwrap();
        assert_eq!(
            text,
            "a,loss/law,seed,chosen\n\"x, \"\"y\"\"\",,1,true\n,0.1,2,\nz,-2,,false\n"
        );
        let file = parquet::data_type::AsBytes::as_bytes(&parquet(&columns).unwrap()).to_vec();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        std::fs::write(&path, file).unwrap();
        let reader = SerializedFileReader::new(std::fs::File::open(&path).unwrap()).unwrap();
        let rows: Vec<String> =
            reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_string()).collect();
        assert_eq!(rows.len(), 3);
        assert!(
            rows[1].contains("null") && rows[1].contains("0.1") && rows[1].contains("seed: 2"),
            "{rows:?}"
        );
    }
}
