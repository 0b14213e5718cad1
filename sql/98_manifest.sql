-- The manifest: which functions this installation has made, and a checksum of each. emergency_stop_faults() compares it with
-- what is there, so that a function that is missing, or is not the one that was installed, is found before it is needed.

-- function_checksums(functions): changes whenever what a function does may have changed.
-- Returns  a row for each that exists: oid, checksum
-- Raises   nothing of its own
-- Locks    nothing
CREATE OR REPLACE FUNCTION function_checksums(functions oid[])
RETURNS TABLE (oid oid, checksum text) LANGUAGE plpgsql STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN QUERY
        SELECT p.oid, md5(concat_ws(' ', p.prosrc, p.prosecdef, p.provolatile, p.proconfig))
        FROM pg_proc p
        WHERE p.oid = ANY (functions);
END;
$$;

-- installed_functions(): the manifest. Whatever it lists, itself included, is closed to PUBLIC.
-- Returns  {"get_job(text)": "d41d8cd98f00b204e9800998ecf8427e", ...}
DO $$
DECLARE
    v_functions jsonb;
BEGIN
    -- This transaction has written these rows of the catalog, itself or in a savepoint of it. Others that are committed
    -- meanwhile do not have our search_path.
    SELECT jsonb_object_agg(c.oid::regprocedure, c.checksum) INTO v_functions
    FROM function_checksums(ARRAY(
        SELECT p.oid
        FROM pg_proc p
        WHERE p.pronamespace = to_regnamespace(quote_ident(current_schema()))
          AND age(p.xmin) <= age(pg_current_xact_id()::xid)
          AND p.proconfig @> ARRAY['search_path=' || current_setting('search_path')]
          AND p.proname <> 'installed_functions')) c;
    EXECUTE format('CREATE OR REPLACE FUNCTION installed_functions() RETURNS jsonb LANGUAGE sql IMMUTABLE SET search_path FROM CURRENT AS %L',
                   format('SELECT %L::jsonb', v_functions));
    EXECUTE format('REVOKE ALL ON FUNCTION installed_functions(), %s FROM PUBLIC',
                   (SELECT string_agg(f.signature, ', ') FROM jsonb_object_keys(v_functions) AS f (signature)));
END;
$$;
