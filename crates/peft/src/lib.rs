//! hydralora-peft
