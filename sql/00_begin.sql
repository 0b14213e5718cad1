-- Begins the installation, which is one transaction: installers take turns, and from here on every name means the
-- first schema of the installer's search_path, never a temporary table.
--
-- Raises   invalid_schema_name (3F000)  search_path names no schema that exists

DO $$
BEGIN
    IF current_schema() IS NULL THEN
        RAISE invalid_schema_name
            USING MESSAGE = 'search_path names no schema that exists: expected the one to install into';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), true);
END;
$$;
