//! Which chat template counts for a model with an adapter, and where its answers end.

use hydralora_data::ChatTemplate;
use hydralora_model::ModelSource;
use hydralora_peft::Tuned;
use hydralora_peft::io::Metadata;
use hydralora_run::ends;

/// The chat template in force and the tokens at which answers end.
pub(crate) struct InForce {
    /// The adapter's template, or else the model's own.
    pub(crate) template: Option<ChatTemplate>,
    /// The tokens, the template's first.
    pub(crate) end_ids: Vec<u32>,
    /// What a person should know of it.
    pub(crate) notes: Vec<String>,
}

/// The model's own chat template.
pub(crate) fn own_template(source: &ModelSource) -> anyhow::Result<Option<ChatTemplate>> {
    let template = source.tokenizer.chat_template();
    let parse = |source: &str| ChatTemplate::from_source("of the model", source);
    Ok(template.map(parse).transpose()?)
}

/// The chat template that an adapter was trained with, its arguments among it.
pub(crate) fn trained_template(
    metadata: Option<&Metadata>,
) -> anyhow::Result<Option<ChatTemplate>> {
    let Some(metadata) = metadata else { return Ok(None) };
    let Some(source) = metadata.chat_template.as_deref() else { return Ok(None) };
    let template = ChatTemplate::from_source("of the adapter", source)?;
    Ok(Some(template.with_arguments(&metadata.template_arguments)))
}

impl InForce {
    /// Of a model with an adapter that was trained as `metadata` says. With `prefer_base` the model's
    /// own template counts.
    pub(crate) fn of(
        source: &ModelSource,
        metadata: Option<&Metadata>,
        prefer_base: bool,
    ) -> anyhow::Result<Self> {
        let own = own_template(source)?;
        let mut notes = Vec::new();
        let trained = trained_template(metadata)?;
        if let (Some(own), Some(trained)) = (&own, &trained)
            && own.source() != trained.source()
        {
            let other = "the adapter was trained with another chat template than the model's";
            notes.push(match prefer_base {
                true => format!("note: {other}"),
                false => format!("note: {other}; the adapter's is used"),
            });
        }
        let template = if prefer_base { own } else { trained.or(own) };
        let template = template.map(|template| match metadata {
            Some(metadata) => template.with_arguments(&metadata.template_arguments),
            None => template,
        });
        let named = metadata.map_or(&[][..], |metadata| &metadata.end_tokens);
        let end_ids = ends::end_ids(&source.tokenizer, template.as_ref(), named, &[])?;
        Ok(Self { template, end_ids, notes })
    }
}

/// A note on an adapter that leaves every output of its base as it is.
pub(crate) fn idle_note(tuned: &dyn Tuned) -> Option<String> {
    tuned
        .changes_nothing()
        .then(|| "note: the adapter changes nothing: its update is zero in every layer".to_owned())
}
